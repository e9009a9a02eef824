"""The announced waiting time is what requests have waited lately, and is forgotten when none come."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmd.queue_delay import QueueDelay

WAITS_S = st.floats(0, 100)
GAPS_S = st.floats(0, 100)


def test_steady_waiting_becomes_the_announced_figure_within_a_minute() -> None:
    delay = QueueDelay(now_s=0.0)
    for tenths in range(1, 601):
        delay.note(0.3, now_s=tenths / 10)
    assert delay.at(60.0) == pytest.approx(0.3, rel=0.01)


def test_one_request_that_had_to_wait_counts_for_a_fifth() -> None:
    delay = QueueDelay(now_s=0.0)
    delay.note(5.0, now_s=1000.0)
    assert delay.at(1000.0) == pytest.approx(5.0 * 0.18, rel=0.01)


def test_the_figure_holds_between_two_requests_and_falls_when_none_come() -> None:
    delay = QueueDelay(now_s=0.0)
    for second in range(1, 100):
        delay.note(1.0, now_s=float(second))
    assert delay.at(101.0) == pytest.approx(1.0, rel=0.01)
    assert delay.at(111.0) == pytest.approx(0.37, rel=0.01)
    assert delay.at(160.0) < 0.01


@given(st.lists(st.tuples(GAPS_S, WAITS_S), min_size=1))
@settings(deadline=None)
def test_the_figure_is_never_above_the_longest_wait_and_never_rises_by_itself(
    requests: list[tuple[float, float]],
) -> None:
    delay = QueueDelay(now_s=0.0)
    now_s = 0.0
    for gap_s, waited_s in requests:
        now_s += gap_s
        delay.note(waited_s, now_s)
    figures = [delay.at(now_s + later_s) for later_s in range(20)]
    assert 0 <= figures[0] <= max(waited_s for _, waited_s in requests) * (1 + 1e-9)
    assert all(later <= earlier for earlier, later in pairwise(figures))
