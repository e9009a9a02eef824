"""How long a request waits for the device these days: an average over the last seconds. Pure; times are handed in."""

import math

TIME_CONSTANT_S = 10.0
"""What was longer ago counts for little."""
BUSY_S = 2.0
"""A request speaks for the time since the one before it, or for so much of it: before that, the device had nothing to
do. So one alone counts for a fifth: a long prompt in an idle server makes no queue."""


class QueueDelay:
    """Smoothed waiting time; falls while nobody asks for anything."""

    def __init__(self, now_s: float) -> None:
        self._delay_s = 0.0
        self._noted_at_s = now_s

    def note(self, waited_s: float, now_s: float) -> None:
        """Takes up how long a request that has begun had waited."""
        spoken_for_s = min(now_s - self._noted_at_s, BUSY_S)
        self._delay_s = self.at(now_s)
        self._delay_s += (waited_s - self._delay_s) * (1 - math.exp(-spoken_for_s / TIME_CONSTANT_S))
        self._noted_at_s = now_s

    def at(self, now_s: float) -> float:
        """What a request can expect, in seconds."""
        idle_s = max(0.0, now_s - self._noted_at_s - BUSY_S)
        return self._delay_s * math.exp(-idle_s / TIME_CONSTANT_S)
