"""Who has had how much of the device lately: seconds of service by peer, fading. Pure; times are handed in."""

import math
from collections.abc import Mapping

from p2pswarm.core.ids import PeerId

TIME_CONSTANT_S = 10.0
"""What was served longer ago counts for little."""
FORGOTTEN_S = 1e-3
"""Whoever has had less, lately, is as good as new."""
MAX_REMEMBERED = 1024


class Service:
    """Seconds of the device's time that each peer was given."""

    def __init__(self) -> None:
        self._used_s: dict[PeerId, tuple[float, float]] = {}
        """What it was, and when."""

    def note(self, peer_id: PeerId, served_s: float, now_s: float) -> None:
        """Counts service that has just ended."""
        self._used_s[peer_id] = (self.used_s(peer_id, now_s) + served_s, now_s)
        if len(self._used_s) > MAX_REMEMBERED:
            used_s = self.by_peer(now_s)
            self._used_s = {peer: (used, now_s) for peer, used in used_s.items() if used > FORGOTTEN_S}

    def used_s(self, peer_id: PeerId, now_s: float) -> float:
        """What the peer has had lately."""
        used_s, at_s = self._used_s.get(peer_id, (0.0, now_s))
        return used_s * math.exp((at_s - now_s) / TIME_CONSTANT_S)

    def by_peer(self, now_s: float) -> Mapping[PeerId, float]:
        """What each peer has had lately."""
        return {peer_id: self.used_s(peer_id, now_s) for peer_id in self._used_s}
