"""How long is waited for servers, and how often others are tried."""

import pytest

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.recovery import LONGEST_WAIT_S, HopFailure, Recovery, ban_reason
from p2pswarm.client.step_times import StepTimes, declared_step_s
from p2pswarm.core.errors import (
    BadAnswer,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    MissingBlocksError,
    PeerUnreachable,
    ProtocolViolation,
    RequestRefused,
    ServerBusy,
    ServerFailed,
    SessionLost,
)
from p2pswarm.core.ids import PeerId
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import BanReason
from p2pswarm.testing.running_sum_service import sum_server_info

PEER = PeerId("12D3KooWsomebody")
BLOCKS = Span(3, 7)
MISSING = MissingBlocksError("no server for blocks 3:7", [(3, 7)])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionLost("", PEER), BanReason.UNREACHABLE),
        (PeerUnreachable("", PEER), BanReason.UNREACHABLE),
        (DeadlineExceeded("", PEER), BanReason.UNREACHABLE),
        (BadAnswer("", PEER), BanReason.MISBEHAVED),
        (ProtocolViolation("", PEER), BanReason.MISBEHAVED),
        (ServerFailed("", PEER), BanReason.MISBEHAVED),
        (ServerBusy("", PEER), None),
        (SessionLost("", PEER), None),
        (RequestRefused("", PEER), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_who_is_to_blame_is_banned(error: HopFailure, reason: BanReason | None) -> None:
    assert ban_reason(error) is reason


def test_servers_without_blame_are_avoided_until_blocks_had_to_be_waited_for() -> None:
    recovery = Recovery(ClientConfig(known_peers_path=None))
    recovery.after_failure(ServerBusy("full", PEER), BLOCKS, 0.0)
    recovery.after_failure(ConnectionLost("gone", PeerId("another")), BLOCKS, 0.0)
    assert recovery.avoided == {PEER}
    recovery.wait_s(MISSING, 1.0)
    assert not recovery.avoided


def test_waits_grow_and_end_at_the_deadline_with_what_was_tried() -> None:
    recovery = Recovery(ClientConfig(known_peers_path=None, recovery_timeout_s=60.0))
    recovery.after_failure(ConnectionLost("gone", PEER), BLOCKS, 100.0)
    now_s, waits_s = 100.0, []
    while now_s < 160.0:
        waits_s.append(recovery.wait_s(MISSING, now_s))
        now_s += waits_s[-1]
    assert waits_s[:5] == [0.0, 0.25, 0.5, 1.0, 2.0]
    assert max(waits_s) == LONGEST_WAIT_S
    assert now_s == 160.0
    with pytest.raises(MissingBlocksError, match="blocks 3:7; tried: …mebody; the last failure: gone") as error:
        recovery.wait_s(MISSING, now_s)
    assert error.value.missing == ((3, 7),)
    with pytest.raises(MissingBlocksError, match="blocks 3:7 that works; tried"):
        recovery.after_failure(ConnectionLost("again", PEER), BLOCKS, now_s)


def test_number_of_retries_can_be_bounded() -> None:
    recovery = Recovery(ClientConfig(known_peers_path=None, max_retries=2))
    for number in range(2):
        recovery.after_failure(ConnectionLost(f"{number}", PEER), BLOCKS, 0.0)
    with pytest.raises(ConnectionLost, match="third"):
        recovery.after_failure(ConnectionLost("third", PEER), BLOCKS, 0.0)


def test_refusal_by_all_servers_is_told_at_once() -> None:
    recovery = Recovery(ClientConfig(known_peers_path=None))
    recovery.after_failure(RequestRefused("asked were blocks 0:9", PEER), BLOCKS, 0.0)
    with pytest.raises(RequestRefused, match="asked were blocks 0:9"):
        recovery.wait_s(MISSING, 0.0)


def test_two_servers_that_refuse_a_step_are_believed_and_one_is_not() -> None:
    recovery = Recovery(ClientConfig(known_peers_path=None))
    recovery.after_failure(RequestRefused("no", PEER), BLOCKS, 0.0)
    assert recovery.avoided == {PEER}
    with pytest.raises(RequestRefused, match="no, really"):
        recovery.after_failure(RequestRefused("no, really", PeerId("another")), BLOCKS, 0.0)


def test_time_spent_on_a_replay_that_worked_does_not_count() -> None:
    recovery = Recovery(ClientConfig(known_peers_path=None, recovery_timeout_s=60.0))
    recovery.after_failure(ConnectionLost("gone", PEER), BLOCKS, 0.0)
    recovery.do_not_count(300.0)
    recovery.after_failure(ConnectionLost("gone too", PEER), BLOCKS, 310.0)
    with pytest.raises(MissingBlocksError):
        recovery.wait_s(MISSING, 360.0)


def test_stand_ins_get_more_time_to_open_each_time_that_none_is_left() -> None:
    recovery = Recovery(ClientConfig(known_peers_path=None, open_timeout_s=5.5))
    recovery.after_failure(ConnectionLost("gone", PEER), BLOCKS, 0.0)
    timeouts_s = [recovery.open_timeout_s]
    for now_s in range(3):
        recovery.wait_s(MISSING, float(now_s))
        timeouts_s.append(recovery.open_timeout_s)
    assert timeouts_s == [4.0, 5.0, 5.5, 5.5]


def test_impossible_times_and_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_retries is 0 or more, or None, got -1"):
        ClientConfig(max_retries=-1)
    with pytest.raises(ConfigError, match="recovery_timeout_s is a number of seconds, 0 or more, got -1"):
        ClientConfig(recovery_timeout_s=-1)
    with pytest.raises(ConfigError, match="min_step_timeout_s is a number of seconds above 0, got 0"):
        ClientConfig(min_step_timeout_s=0)


def test_server_is_late_after_four_times_what_it_usually_takes() -> None:
    times = StepTimes()
    for _ in range(100):
        times.note(1, 2.0)
    assert times.expected_s(1, declared_s=0.1) == pytest.approx(2.0)
    assert times.late_after_s(1, declared_s=0.1, min_s=3.0) == pytest.approx(8.0, rel=0.01)


def test_unsteady_server_is_given_more_time_and_a_fast_one_the_shortest_there_is() -> None:
    steady, unsteady, fast = StepTimes(), StepTimes(), StepTimes()
    for number in range(100):
        steady.note(1, 2.0)
        unsteady.note(1, 1.0 if number % 2 else 3.0)
        fast.note(1, 0.01)
    assert unsteady.late_after_s(1, 0.1, 3.0) > 1.4 * steady.late_after_s(1, 0.1, 3.0)
    assert fast.late_after_s(1, 0.1, 3.0) == 3.0


def test_prompts_are_judged_by_the_time_a_token_and_by_announcements_at_first() -> None:
    times, server = StepTimes(), sum_server_info(PEER)  # announces one token a second through one block
    declared_s = declared_step_s(server, num_blocks=4, num_tokens=100, num_bytes=25_000, round_trip_s=0.4)
    assert declared_s == pytest.approx(400.5)
    assert times.late_after_s(100, declared_s, 3.0) == pytest.approx(4 * 400.5)
    times.note(100, 10.0)
    assert times.expected_s(200, declared_s) == pytest.approx(20.0)
    assert times.expected_s(1, declared_s=0.7) == 0.7
