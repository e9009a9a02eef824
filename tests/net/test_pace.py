"""A pace: over any time no more is let through than its rate and its burst allow, and no less."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.net.pace import Pace


def test_a_burst_goes_at_once_and_the_rest_at_the_rate() -> None:
    pace = Pace(rate_per_s=10, burst=3, now_s=0.0)
    begun_at_s = []
    now_s = 0.0
    for _ in range(6):
        now_s = pace.ready_at_s(now_s)
        begun_at_s.append(now_s)
        pace.spend(1, now_s)
    assert begun_at_s == pytest.approx([0, 0, 0, 0, 0.1, 0.2])


def test_what_was_not_needed_is_given_back() -> None:
    pace = Pace(rate_per_s=0.2, burst=1, now_s=0.0)
    pace.spend(3, 0.0)
    assert pace.ready_at_s(0.0) == pytest.approx(10)
    pace.spend(-1, 0.0)
    assert pace.ready_at_s(0.0) == pytest.approx(5)


def test_no_more_than_a_burst_is_saved_up() -> None:
    pace = Pace(rate_per_s=10, burst=3, now_s=0.0)
    pace.spend(5, 1000.0)
    assert pace.ready_at_s(1000.0) == pytest.approx(1000.2)


@given(
    st.lists(st.tuples(st.floats(0, 2), st.floats(0.01, 2)), min_size=1, max_size=50),
    st.floats(0.1, 100),
    st.floats(0.1, 10),
)
def test_who_waits_until_ready_spends_no_faster_than_allowed(
    steps: list[tuple[float, float]], rate_per_s: float, burst: float
) -> None:
    pace = Pace(rate_per_s, burst, 0.0)
    now_s = spent = 0.0
    for pause_s, amount in steps:
        now_s = pace.ready_at_s(now_s + pause_s)
        assert spent <= burst + rate_per_s * now_s + 1e-6
        pace.spend(amount, now_s)
        spent += amount
