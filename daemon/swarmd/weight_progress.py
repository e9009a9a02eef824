"""Tells of long work on a model's weights (download, conversion, hashing) as events, a few seconds apart.

What is quick is not worth an event: the first one comes when work of a kind has gone on for `PERIOD_S`.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import trio

from p2pswarm.checkpoint.progress import Progress, Work
from swarmd.events import Events

PERIOD_S = 3.0
"""Often enough to see that it goes on, and a line a percent for what takes five minutes."""


class WeightProgress:
    """A `ProgressListener` for the thread that loads; made in the trio thread, where the events go.

    `clock_s` is asked by the loading thread.
    """

    def __init__(self, events: Events, clock_s: Callable[[], float] = time.perf_counter) -> None:
        self._events = events
        self._clock_s = clock_s
        self._token = trio.lowlevel.current_trio_token()
        self._work: Work | None = None
        self._last_told_s = 0.0

    def __call__(self, progress: Progress) -> None:
        now_s = self._clock_s()
        is_new = progress.work is not self._work
        if is_new:
            self._work, self._last_told_s = progress.work, now_s
        is_wait = is_new and progress.work is Work.WAITING
        if not is_wait and now_s - self._last_told_s < PERIOD_S:
            return
        self._last_told_s = now_s
        tell = partial(
            self._events,
            "weights",
            work=progress.work.value,
            what=progress.what,
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
        )
        with suppress(trio.RunFinishedError):  # told to stop meanwhile
            self._token.run_sync_soon(tell)
