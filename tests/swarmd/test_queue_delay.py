"""The announced waiting time is what requests have waited lately, and is forgotten when none come."""

import math
import threading
from functools import partial
from itertools import pairwise

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from swarmd.device_thread import open_device_thread
from swarmd.queue_delay import TIME_CONSTANT_S, QueueDelay

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


async def test_the_device_thread_tells_how_long_functions_wait() -> None:
    now_s = 0.0
    first_started, first_may_end, second_started, second_may_end = (threading.Event() for _ in range(4))

    def work(started: threading.Event, may_end: threading.Event) -> None:
        started.set()
        may_end.wait(10.0)

    async with open_device_thread(clock_s=lambda: now_s) as device:
        assert device.queue_delay_s == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.run, partial(work, first_started, first_may_end))
            await trio.to_thread.run_sync(first_started.wait)
            nursery.start_soon(device.run, partial(work, second_started, second_may_end))
            await wait_all_tasks_blocked()
            now_s = 10.0
            first_may_end.set()
            await trio.to_thread.run_sync(second_started.wait)
            now_s = 11.0
            second_may_end.set()
        assert device.queue_delay_s == pytest.approx(10 * (1 - math.exp(-1 / TIME_CONSTANT_S)))
        now_s = 100.0
        assert device.queue_delay_s < 0.01
