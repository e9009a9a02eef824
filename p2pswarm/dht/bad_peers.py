"""Who did not answer lately: such peers are left out of lookups for a while, longer each time.

Any sign of life clears a peer. Only an opinion of this node; it is never told to others.
"""

from collections import OrderedDict
from dataclasses import dataclass

from p2pswarm.core.ids import PeerId

MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class _Verdict:
    bad_until_s: float
    num_failures: int


class BadPeers:
    """Peers by how long they are to be left alone; the times are the caller's."""

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._verdicts: OrderedDict[PeerId, _Verdict] = OrderedDict()

    def failed(self, peer_id: PeerId, now_s: float) -> None:
        """Notes a request without an answer. Several that fail during one verdict count once."""
        verdict = self._verdicts.get(peer_id, _Verdict(now_s, 0))
        if verdict.bad_until_s > now_s:
            return
        pause_s = min(self._most_s, self._first_s * 2.0**verdict.num_failures)
        self._verdicts[peer_id] = _Verdict(now_s + pause_s, min(verdict.num_failures + 1, 30))
        self._verdicts.move_to_end(peer_id)
        if len(self._verdicts) > MAX_REMEMBERED:
            self._verdicts.popitem(last=False)

    def answered(self, peer_id: PeerId) -> None:
        self._verdicts.pop(peer_id, None)

    def is_bad(self, peer_id: PeerId, now_s: float) -> bool:
        verdict = self._verdicts.get(peer_id)
        return verdict is not None and verdict.bad_until_s > now_s

    def forget(self) -> None:
        """Gives everyone another chance: after an outage of our own, the verdicts say nothing."""
        self._verdicts.clear()
