"""A server measures those who may take over from it, and remembers the nearest for a while."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.testing.message_strategies import spans
from swarmd.next_servers import LIFETIME_S, MAX_AT_END, MAX_KEPT, MAX_WITHIN, RoundTrips, likely_next


def server(name: str, span: str, state: ServerState = ServerState.ONLINE) -> ServerInfo:
    return ServerInfo(PeerId(name), ModelId("m@0123"), Span.parse(span), state, (), 30, 1.0, 1.0, 1.0, 1.0, "float32")


ME = server("me", "10:20")


def names(chosen: list[ServerInfo]) -> set[str]:
    return {info.peer_id for info in chosen}


def test_those_who_can_take_over_at_the_end_or_before_it_are_measured() -> None:
    others = [
        server("starts-there", "20:30"),
        server("overlaps", "15:25"),
        server("surrounds", "0:30"),
        server("within", "12:18"),
        server("before", "0:10"),
        server("same-start", "10:15"),
        server("after", "21:30"),
        server("joining", "20:30", ServerState.JOINING),
        server("draining", "20:30", ServerState.DRAINING),
        ME,
    ]
    assert names(likely_next(ME, others, Random(1))) == {"starts-there", "overlaps", "surrounds", "within"}


def test_those_who_start_where_we_end_come_first() -> None:
    others = [server(f"overlaps-{index}", "19:30") for index in range(20)]
    others += [server(f"starts-there-{index}", "20:30") for index in range(MAX_AT_END)]
    chosen = likely_next(ME, others, Random(1))
    assert {f"starts-there-{index}" for index in range(MAX_AT_END)} <= names(chosen)
    assert len(chosen) == MAX_AT_END + MAX_WITHIN


def test_the_last_server_of_a_chain_has_nobody_to_measure_at_its_end() -> None:
    assert likely_next(server("last", "20:30"), [ME, server("other", "20:30")], Random(1)) == []


def test_of_many_each_gets_its_turn() -> None:
    others = [server(f"next-{index}", "20:30") for index in range(30)]
    random = Random(7)
    seen = {name for _ in range(60) for name in names(likely_next(ME, others, random))}
    assert len(seen) == 30


@given(st.lists(spans(30), max_size=40), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_few_are_chosen_each_once_and_never_oneself(all_spans: list[Span], random: Random) -> None:
    others = [server(f"peer-{index}", str(span)) for index, span in enumerate(all_spans)]
    chosen = likely_next(ME, [ME, *others], random)
    assert len(chosen) <= MAX_AT_END + MAX_WITHIN
    assert len(names(chosen)) == len(chosen)
    for info in chosen:
        assert info.peer_id != ME.peer_id
        assert info.span.covers(20) or 10 < info.span.start < 20
    if any(info.span.covers(20) for info in others):
        assert any(info.span.covers(20) for info in chosen)


def test_one_slow_answer_hardly_counts_and_a_lasting_change_does() -> None:
    round_trips = RoundTrips()
    peer_id = PeerId("next")
    round_trips.note(peer_id, 0.1, now_s=0.0)
    assert round_trips.nearest(0.0) == {peer_id: 0.1}
    round_trips.note(peer_id, 0.6, now_s=20.0)
    assert abs(round_trips.nearest(20.0)[peer_id] - 0.2) < 1e-9
    for number in range(20):
        round_trips.note(peer_id, 0.6, now_s=40.0 + number)
    assert abs(round_trips.nearest(60.0)[peer_id] - 0.6) < 0.01


def test_a_first_measurement_that_was_too_long_is_soon_forgotten() -> None:
    round_trips = RoundTrips()
    peer_id = PeerId("next")
    round_trips.note(peer_id, 1.0, now_s=0.0)
    for number in range(5):
        round_trips.note(peer_id, 0.01, now_s=20.0 * number)
    assert round_trips.nearest(100.0)[peer_id] < 0.05


def test_what_is_old_or_did_not_answer_is_forgotten() -> None:
    round_trips = RoundTrips()
    round_trips.note(PeerId("old"), 0.1, now_s=0.0)
    round_trips.note(PeerId("new"), 0.1, now_s=LIFETIME_S)
    round_trips.note(PeerId("silent"), 0.1, now_s=LIFETIME_S)
    round_trips.forget(PeerId("silent"))
    round_trips.forget(PeerId("never-heard-of"))
    assert round_trips.nearest(LIFETIME_S) == {"new": 0.1}


def test_only_the_nearest_are_announced() -> None:
    round_trips = RoundTrips()
    for index in range(MAX_KEPT + 10):
        round_trips.note(PeerId(f"peer-{index}"), 1.0 - index / 100, now_s=0.0)
    nearest = round_trips.nearest(0.0)
    assert set(nearest) == {f"peer-{index}" for index in range(10, MAX_KEPT + 10)}
