"""Whether other processes use whatever processor time this one leaves: then it costs nothing to let the device wait.

That is so where several servers and clients share a machine, or its owner works on it. On a machine of its own a device
that waits is only slower. Arithmetic over the system's counters; times are handed in.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import psutil

PERIOD_S = 1.0
"""Between two looks at the counters, which cost 0.1 ms."""
MIN_OTHERS = 0.5
"""Processors kept busy by others."""
MAX_IDLE = 1.0
"""Processors that nobody uses: with a whole one to spare, nobody is in the way of anybody."""


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds since some time in the past."""

    idle_s: float
    """Of all processors."""
    total_s: float
    """Of all processors, idle or not."""
    own_s: float
    """Used by this process."""


def read_cpu_times() -> CpuTimes:
    """The system's counters as they are now."""
    times = psutil.cpu_times()
    # What is counted for guests is counted for users too.
    total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    own = os.times()
    return CpuTimes(times.idle + getattr(times, "iowait", 0.0), total_s, own.user + own.system)


class CpuSharing:
    """Looks at the counters when it is asked, at most once a second."""

    def __init__(self, num_cpus: int, read: Callable[[], CpuTimes] = read_cpu_times) -> None:
        self._num_cpus = num_cpus
        self._read = read
        self._times = read()
        self._looked_at_s: float | None = None
        self._is_shared = False

    def is_shared(self, now_s: float) -> bool:
        """Whether it was so in the last second or two."""
        if self._looked_at_s is None:
            self._looked_at_s = now_s
        elif now_s - self._looked_at_s >= PERIOD_S:
            self._looked_at_s = now_s
            before, self._times = self._times, self._read()
            self._is_shared = self._was_shared(before, self._times)
        return self._is_shared

    def _was_shared(self, before: CpuTimes, after: CpuTimes) -> bool:
        passed_s = (after.total_s - before.total_s) / self._num_cpus
        if passed_s <= 0:
            return False
        idle = (after.idle_s - before.idle_s) / passed_s
        others = self._num_cpus - idle - (after.own_s - before.own_s) / passed_s
        return others > MIN_OTHERS and idle < MAX_IDLE
