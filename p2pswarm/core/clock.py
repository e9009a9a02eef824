"""The one place that reads the wall clock; everything else is handed a `Clock`.

Waits and deadlines are trio's (`trio.current_time`). A `Clock` tells calendar time, which two machines can compare:
when a signed record expires, say.
"""

import time
from typing import Protocol


class Clock(Protocol):
    def unix_time_s(self) -> float:
        """Seconds since 1970 UTC."""
        ...


class SystemClock:
    """The machine's own clock."""

    def unix_time_s(self) -> float:
        return time.time()
