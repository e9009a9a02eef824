"""Bans start short, double, end, and are forgotten by those who behave."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.ids import PeerId
from p2pswarm.routing.bans import BanList, BanReason

PEER = PeerId("a")
UNREACHABLE, MISBEHAVED = BanReason.UNREACHABLE, BanReason.MISBEHAVED


def test_each_ban_is_twice_as_long_as_the_one_before_up_to_the_longest() -> None:
    bans = BanList(ban_s=15.0, max_ban_s=100.0)
    now_s = 1000.0
    durations_s = []
    for _ in range(5):
        ban = bans.add(PEER, now_s, UNREACHABLE)
        durations_s.append(ban.until_s - now_s)
        now_s = ban.until_s
    assert durations_s == [15.0, 30.0, 60.0, 100.0, 100.0]


def test_many_reports_of_one_failure_are_one_ban() -> None:
    bans = BanList()
    for seconds in range(10):
        bans.add(PEER, float(seconds), UNREACHABLE)
    assert bans.active(14.9)[PEER].strikes == 1
    assert not bans.active(15.0)


def test_worst_reason_is_the_one_that_is_named() -> None:
    bans = BanList()
    bans.add(PEER, 0.0, UNREACHABLE)
    bans.add(PEER, 1.0, MISBEHAVED)
    assert bans.active(2.0)[PEER].reason is MISBEHAVED
    bans.add(PEER, 3.0, UNREACHABLE)
    assert bans.active(4.0)[PEER].reason is MISBEHAVED


def test_failure_soon_after_a_ban_counts_double_and_a_late_one_as_the_first() -> None:
    soon, late = BanList(ban_s=10.0), BanList(ban_s=10.0)
    soon.add(PEER, 0.0, UNREACHABLE)
    late.add(PEER, 0.0, UNREACHABLE)
    assert soon.add(PEER, 19.9, UNREACHABLE).strikes == 2
    assert late.add(PEER, 20.0, UNREACHABLE).strikes == 1


def test_strikes_are_forgotten_one_by_one() -> None:
    bans = BanList(ban_s=10.0)
    bans.add(PEER, 0.0, UNREACHABLE)  # until 10
    bans.add(PEER, 10.0, UNREACHABLE)  # until 30
    bans.add(PEER, 30.0, UNREACHABLE)  # until 70: one strike less at 110, none at 130 and 140
    assert bans.add(PEER, 115.0, UNREACHABLE).strikes == 3
    bans = BanList(ban_s=10.0)
    for now_s in (0.0, 10.0, 30.0):
        bans.add(PEER, now_s, UNREACHABLE)
    assert bans.add(PEER, 135.0, UNREACHABLE).strikes == 2


def test_forgiven_server_starts_anew() -> None:
    bans = BanList()
    bans.add(PEER, 0.0, MISBEHAVED)
    bans.forgive(PEER)
    assert not bans.active(0.0)
    assert bans.add(PEER, 1.0, UNREACHABLE).strikes == 1


@given(st.lists(st.tuples(st.integers(0, 1200), st.sampled_from("ab")), max_size=30))
def test_ban_is_never_longer_than_the_longest_and_all_are_forgotten_in_the_end(
    failures: list[tuple[int, str]],
) -> None:
    bans = BanList(ban_s=15.0, max_ban_s=600.0)
    now_s = 0.0
    for later_s, name in failures:
        now_s += later_s
        ban = bans.add(PeerId(name), now_s, UNREACHABLE)
        assert now_s < ban.until_s <= now_s + 600.0
        assert bans.active(now_s)[PeerId(name)] == ban
    for _ in range(40):
        now_s += 1200.0
        assert not bans.active(now_s)
    assert bans.add(PEER, now_s, UNREACHABLE).strikes == 1


def test_ban_without_length_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than 0 s"):
        BanList(ban_s=0.0)
