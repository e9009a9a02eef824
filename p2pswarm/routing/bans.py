"""Which servers are left out of new routes for a while after they failed. Facts and times in, an answer out.

The first ban is short, since most failures are a restart or a lost connection; each further failure doubles it. After
a ban has ended, each time as long again without a failure takes one strike away, so that a server which behaves well
long enough is as good as new.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from p2pswarm.core.ids import PeerId


class BanReason(Enum):
    """What the server did."""

    UNREACHABLE = "unreachable"
    """No connection, or no answer in time: it may be back any moment."""
    MISBEHAVED = "misbehaved"
    """It answered nonsense, or reported a failure of its own."""


@dataclass(frozen=True, slots=True)
class Ban:
    """Why and until when a server is left out."""

    reason: BanReason
    until_s: float
    strikes: int
    """Failures that are not forgotten yet, this one included."""


class BanList:
    """The bans of one client; times are on whatever clock the caller uses throughout."""

    def __init__(self, ban_s: float = 15.0, max_ban_s: float = 600.0) -> None:
        if not ban_s > 0:
            raise ValueError(f"a ban is longer than 0 s, got {ban_s}")
        self._ban_s = ban_s
        self._max_ban_s = max(ban_s, max_ban_s)
        self._bans: dict[PeerId, Ban] = {}

    def add(self, peer_id: PeerId, now_s: float, reason: BanReason) -> Ban:
        """Bans the server, for longer than the last time if that is not forgotten; says for how long.

        A server that is banned already stays so until the same time: several sessions that meet one failure report
        it several times.
        """
        self._forget(now_s)
        earlier = self._bans.get(peer_id)
        if earlier is not None and now_s < earlier.until_s:
            strikes, until_s = earlier.strikes, earlier.until_s
            if earlier.reason is BanReason.MISBEHAVED:
                reason = earlier.reason
        else:
            strikes = 1 if earlier is None else earlier.strikes + 1
            until_s = now_s + self._duration_s(strikes)
        ban = self._bans[peer_id] = Ban(reason, until_s, strikes)
        return ban

    def forgive(self, peer_id: PeerId) -> None:
        """Takes the server back at once, with all its strikes forgotten."""
        self._bans.pop(peer_id, None)

    def active(self, now_s: float) -> dict[PeerId, Ban]:
        """The bans that hold now."""
        self._forget(now_s)
        return {peer_id: ban for peer_id, ban in self._bans.items() if now_s < ban.until_s}

    def _duration_s(self, strikes: int) -> float:
        duration_s = self._ban_s
        for _ in range(strikes - 1):
            if duration_s >= self._max_ban_s:
                break
            duration_s *= 2
        return min(duration_s, self._max_ban_s)

    def _forget(self, now_s: float) -> None:
        """Takes away the strikes that are old enough, and servers that have none left."""
        self._bans = dict(self._remembered(now_s))

    def _remembered(self, now_s: float) -> Mapping[PeerId, Ban]:
        kept = {}
        for peer_id, ban in self._bans.items():
            strikes, forgotten_at_s = ban.strikes, ban.until_s + self._duration_s(ban.strikes)
            while strikes and forgotten_at_s <= now_s:
                strikes -= 1
                forgotten_at_s += self._duration_s(strikes)
            if strikes:
                # The ban that stands for the strikes left: over by now, and forgotten after as long again.
                until_s = ban.until_s if strikes == ban.strikes else forgotten_at_s - self._duration_s(strikes)
                kept[peer_id] = Ban(ban.reason, until_s, strikes)
        return kept
