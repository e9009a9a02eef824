"""`Pace`: how fast something may go on, with some saved up for a burst. Pure; times are the caller's."""


class Pace:
    """A token bucket: fills by `rate_per_s`, up to `burst`. Units are the caller's."""

    def __init__(self, rate_per_s: float, burst: float, now_s: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._left = burst
        self._counted_at_s = now_s

    def spend(self, amount: float, now_s: float) -> None:
        """Takes that much, also what is not there yet; below zero, gives back what was not needed."""
        self._left = self._left_at(now_s) - amount
        self._counted_at_s = now_s

    def ready_at_s(self, now_s: float) -> float:
        """When there is something to take: `now_s`, or later where too much was taken."""
        return now_s + max(0.0, -self._left_at(now_s) / self._rate_per_s)

    def _left_at(self, now_s: float) -> float:
        return min(self._burst, self._left + (now_s - self._counted_at_s) * self._rate_per_s)
