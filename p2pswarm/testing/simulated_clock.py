"""A calendar that runs on trio's clock, so that `autojump_clock` makes an hour pass in milliseconds."""

import trio

DEFAULT_START_UNIX_S = 1_700_000_000.0
"""Some moment in November 2023; any will do."""


class SimulatedClock:
    """A `core.clock.Clock`: starts at `start_unix_s` when made and goes as fast as `trio.current_time()`."""

    def __init__(self, start_unix_s: float = DEFAULT_START_UNIX_S, *, skew_s: float = 0.0) -> None:
        self._offset_s = start_unix_s + skew_s - trio.current_time()

    def unix_time_s(self) -> float:
        return self._offset_s + trio.current_time()
