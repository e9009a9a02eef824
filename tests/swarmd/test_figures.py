"""An announcement is corrected when clients would choose differently, and not before."""

import pytest

from p2pswarm.core.ids import PeerId
from swarmd.figures import has_room_moved, has_time_moved, have_round_trips_moved

NEAR, FAR = PeerId("near"), PeerId("far")


@pytest.mark.parametrize(
    ("announced", "now", "has_moved"),
    [(1000, 1000, False), (1000, 800, False), (1000, 700, True), (700, 1000, True), (100, 0, True), (0, 1, True)],
)
def test_room_moves_by_a_quarter_of_the_cache_or_to_and_from_none(announced: int, now: int, has_moved: bool) -> None:
    assert has_room_moved(announced, now, total_tokens=1000) is has_moved


@pytest.mark.parametrize(
    ("announced_s", "now_s", "has_moved"),
    [
        (0.0, 0.0015, False),
        (0.0, 0.0025, True),
        (0.1, 0.115, False),
        (0.115, 0.1, False),
        (0.1, 0.13, True),
        (0.13, 0.1, True),
        (0.1, 0.0, True),
    ],
)
def test_times_move_by_a_fifth_and_two_milliseconds(announced_s: float, now_s: float, has_moved: bool) -> None:
    assert has_time_moved(announced_s, now_s) is has_moved


def test_round_trips_move_when_servers_come_or_go_or_one_moves() -> None:
    assert not have_round_trips_moved({}, {})
    assert not have_round_trips_moved({NEAR: 0.010, FAR: 0.2}, {FAR: 0.21, NEAR: 0.011})
    assert have_round_trips_moved({NEAR: 0.010}, {NEAR: 0.010, FAR: 0.2})
    assert have_round_trips_moved({NEAR: 0.010, FAR: 0.2}, {NEAR: 0.010})
    assert have_round_trips_moved({NEAR: 0.010, FAR: 0.2}, {NEAR: 0.010, FAR: 0.3})
