"""`DialGuard`: how often others may have this node dial somebody. Pure: the time is passed in.

A client names the servers to push to, so without a bound it could send this node's connection attempts anywhere, as
fast as it sends steps. An honest client needs one dial for each server that is new to this one.
"""

from collections import deque

from p2pswarm.core.ids import PeerId

WINDOW_S = 10.0
MAX_DIALS = 32
"""In a window, for all who ask together."""
MAX_DIALS_PER_ASKER = 4
UNREACHABLE_S = 30.0
"""For so long a peer is left alone once it could not be reached."""


class DialGuard:
    """Permits or refuses dials; bounded in memory by what it permits."""

    def __init__(self) -> None:
        self._dials: deque[tuple[float, PeerId]] = deque()
        self._unreachable: dict[PeerId, float] = {}
        """With the time until which; the earliest first."""

    def permits(self, asker: PeerId, target: PeerId, now_s: float) -> bool:
        """Whether `target` may be dialled for `asker` now; then it counts as done."""
        self._forget_old(now_s)
        num_asked = sum(dialled_for == asker for _, dialled_for in self._dials)
        if target in self._unreachable or len(self._dials) >= MAX_DIALS or num_asked >= MAX_DIALS_PER_ASKER:
            return False
        self._dials.append((now_s, asker))
        return True

    def note_unreachable(self, target: PeerId, now_s: float) -> None:
        self._unreachable.pop(target, None)
        self._unreachable[target] = now_s + UNREACHABLE_S

    def _forget_old(self, now_s: float) -> None:
        while self._dials and self._dials[0][0] <= now_s - WINDOW_S:
            self._dials.popleft()
        while self._unreachable and next(iter(self._unreachable.values())) <= now_s:
            del self._unreachable[next(iter(self._unreachable))]
