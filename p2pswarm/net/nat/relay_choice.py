"""Which nodes to ask for a place as our relay, and in which order. Pure.

Close ones first, since every byte goes there and back; never two on one machine where there is a choice, because they
die together; and not those that refused or failed lately. What is held is kept: moving costs an announcement.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from p2pswarm.core.ids import PeerId

FIRST_PAUSE_S = 15.0
"""How long a node that refused is left alone; it doubles with each refusal in a row, to `MAX_PAUSE_S`."""
MAX_PAUSE_S = 600.0
LOST_PAUSE_S = 2.0
MAX_REMEMBERED = 256
LOOPBACK = ("127.", "::1")
UNKNOWN_ROUND_TRIP_S = 1.0
"""Beyond that of any node that has been measured."""


@dataclass(frozen=True, slots=True)
class RelayCandidate:
    """A node that may relay for us."""

    peer_id: PeerId
    addresses: tuple[str, ...]
    round_trip_s: float | None = None

    @property
    def hosts(self) -> frozenset[str]:
        """The machines that its addresses lead to, but for whoever dials it."""
        hosts = {parts[2] for address in self.addresses if len(parts := address.split("/")) > 2}
        return frozenset(host for host in hosts if not host.startswith(LOOPBACK))


class RelayChoice:
    """Remembers who refused."""

    def __init__(self) -> None:
        self._refusals: dict[PeerId, tuple[int, float]] = {}

    def refused(self, peer_id: PeerId, now_s: float) -> None:
        """Notes that the node would not relay for us, or could not be asked."""
        num_refusals = self._refusals.pop(peer_id, (0, 0.0))[0] + 1
        pause_s = min(FIRST_PAUSE_S * 2 ** (num_refusals - 1), MAX_PAUSE_S)
        self._note(peer_id, num_refusals, now_s + pause_s)

    def lost(self, peer_id: PeerId, now_s: float) -> None:
        """Notes that a node relays for us no more: it may be back in a moment, and others are there already."""
        self._note(peer_id, 0, now_s + LOST_PAUSE_S)

    def accepted(self, peer_id: PeerId) -> None:
        """Notes that the node relays for us."""
        self._refusals.pop(peer_id, None)

    def next_relays(
        self, candidates: Iterable[RelayCandidate], held: Collection[RelayCandidate], num_wanted: int, now_s: float
    ) -> list[RelayCandidate]:
        """Whom to ask now so as to have `num_wanted` in all; fewer where there are not as many."""
        held_ids = {relay.peer_id for relay in held}
        free = [
            candidate
            for candidate in candidates
            if candidate.peer_id not in held_ids and not self._is_left_alone(candidate.peer_id, now_s)
        ]
        free.sort(key=lambda candidate: (_round_trip_s(candidate), candidate.peer_id))
        chosen: list[RelayCandidate] = []
        while free and len(held_ids) + len(chosen) < num_wanted:
            chosen.append(free.pop(_first_elsewhere(free, [*held, *chosen])))
        return chosen

    def _note(self, peer_id: PeerId, num_refusals: int, until_s: float) -> None:
        self._refusals[peer_id] = (num_refusals, until_s)
        if len(self._refusals) > MAX_REMEMBERED:
            del self._refusals[next(iter(self._refusals))]

    def _is_left_alone(self, peer_id: PeerId, now_s: float) -> bool:
        return peer_id in self._refusals and now_s < self._refusals[peer_id][1]


def _round_trip_s(candidate: RelayCandidate) -> float:
    return UNKNOWN_ROUND_TRIP_S if candidate.round_trip_s is None else candidate.round_trip_s


def _first_elsewhere(candidates: Sequence[RelayCandidate], taken: Collection[RelayCandidate]) -> int:
    """The index of the first that shares no machine with those taken; 0 where all do."""
    taken_hosts = frozenset[str]().union(*(relay.hosts for relay in taken))
    return next((index for index, candidate in enumerate(candidates) if not candidate.hosts & taken_hosts), 0)
