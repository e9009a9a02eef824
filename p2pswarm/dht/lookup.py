"""The course of one lookup: whom to ask next on the way to the nodes closest to a target, and when to stop.

Sans-IO: facts in (`answered`, `failed`), decisions out (`next_to_ask`, `is_finished`). `dht/walk.py` carries them out.
The candidates are the k closest contacts heard of so far, less those that did not answer. It goes beyond the Kademlia
paper in three ways:

- Loosely parallel: a request without an answer after `stagger_s` no longer counts among the `alpha` under way, so that
  a hung peer costs a moment and not its whole timeout.
- Whoever is connected already is asked first, since a dial takes eight round trips.
- Once `alpha` answers in a row have brought nothing closer, as many as the end still wants are asked at once.

It ends when `quorum` of the `window` closest candidates have answered. For a writer both are k. For a reader the quorum
is a few, and the window half of k: when a third of the holders has died, the k closest living nodes are no longer all
holders, but nearly all of the k / 2 closest are.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from kademlia.node import NodeHeap

from p2pswarm.core.ids import PeerId
from p2pswarm.dht.contact import Contact, PeerNode, TargetNode


@dataclass(frozen=True, slots=True)
class LookupLimits:
    """How wide and how far one lookup goes."""

    k: int
    alpha: int
    quorum: int
    window: int
    max_requests: int
    stagger_s: float


class _State(Enum):
    FRESH = "fresh"
    ASKED = "asked"
    ANSWERED = "answered"
    FAILED = "failed"


class _Candidates(NodeHeap):  # type: ignore[misc]  # the package has no types
    """The package's heap of nodes by distance, with a set and a list where it searches and sorts each time."""

    def __init__(self, target: TargetNode, k: int) -> None:
        super().__init__(target, k)
        self._ids: set[bytes] = set()
        self._closest: list[PeerNode] | None = None

    def push(self, nodes: PeerNode) -> None:
        super().push(nodes)
        self._ids.add(nodes.id)
        self._closest = None

    def remove(self, peers: list[bytes]) -> None:
        super().remove(peers)
        self._ids.difference_update(peers)
        self._closest = None

    def __contains__(self, node: PeerNode) -> bool:
        return node.id in self._ids

    def __iter__(self) -> Iterator[PeerNode]:
        """The k closest, the closest first."""
        if self._closest is None:
            self._closest = list(super().__iter__())
        return iter(self._closest)


class Lookup:
    """One walk towards `target_id`; the times are the caller's."""

    def __init__(
        self,
        target_id: bytes,
        start: Iterable[Contact],
        limits: LookupLimits,
        connected_peers: Callable[[], Collection[PeerId]],
    ) -> None:
        self._limits = limits
        self._connected_peers = connected_peers
        self._target = TargetNode(target_id)
        self._heap = _Candidates(self._target, limits.k)
        self._nodes: dict[PeerId, PeerNode] = {}
        self._states: dict[PeerId, _State] = {}
        self._asked_at_s: dict[PeerId, float] = {}
        self._closest_distance: float = math.inf
        self._answers_without_gain = 0
        self.num_requests = 0
        for contact in start:
            self._meet(contact)

    def next_to_ask(self, now_s: float) -> list[Contact]:
        """The contacts to ask now, each named once; the caller reports each with `answered` or `failed`."""
        room = min(self._room(now_s), self._limits.max_requests - self.num_requests)
        if room <= 0:
            return []
        connected_peers = self._connected_peers()
        fresh = sorted(self._fresh(), key=lambda contact: contact.peer_id not in connected_peers)
        chosen = fresh[:room]
        for contact in chosen:
            self._states[contact.peer_id] = _State.ASKED
            self._asked_at_s[contact.peer_id] = now_s
        self.num_requests += len(chosen)
        return chosen

    def answered(self, peer_id: PeerId, contacts: Iterable[Contact]) -> None:
        """The peer answered, and named these contacts."""
        self._settle(peer_id, _State.ANSWERED)
        gains = [self._meet(contact) for contact in contacts]
        self._answers_without_gain = 0 if any(gains) else self._answers_without_gain + 1

    def failed(self, peer_id: PeerId) -> None:
        """The peer did not answer, or not in a way that makes sense."""
        self._settle(peer_id, _State.FAILED)
        self._heap.remove([self._nodes[peer_id].id])

    def wake_at_s(self, now_s: float) -> float:
        """When more may be asked even if no answer comes."""
        moments_s = (asked_at_s + self._limits.stagger_s for asked_at_s in self._asked_at_s.values())
        return min((moment_s for moment_s in moments_s if moment_s > now_s), default=math.inf)

    @property
    def is_finished(self) -> bool:
        if self._num_answered() >= self._limits.quorum:
            return True
        may_ask = self.num_requests < self._limits.max_requests and bool(self._fresh())
        return not (may_ask or self._asked_at_s)

    def closest_answered(self) -> list[Contact]:
        """Up to k contacts that answered, the closest first."""
        return [node.contact for node in self._heap if self._state(node) is _State.ANSWERED]

    def _meet(self, contact: Contact) -> bool:
        """Takes up a contact not heard of before; True where it is the closest yet."""
        if contact.peer_id in self._states:
            return False
        node = PeerNode(contact)
        self._states[contact.peer_id] = _State.FRESH
        self._nodes[contact.peer_id] = node
        self._heap.push(node)
        distance: int = self._target.distance_to(node)
        is_closest = distance < self._closest_distance
        self._closest_distance = min(distance, self._closest_distance)
        return is_closest

    def _settle(self, peer_id: PeerId, state: _State) -> None:
        self._states[peer_id] = state
        self._asked_at_s.pop(peer_id, None)

    def _room(self, now_s: float) -> int:
        """How many more requests may begin now."""
        limits = self._limits
        num_under_way = len(self._asked_at_s)
        num_recent = sum(at_s > now_s - limits.stagger_s for at_s in self._asked_at_s.values())
        room = min(limits.alpha - num_recent, limits.quorum + 2 * limits.alpha - num_under_way)
        if self._answers_without_gain < limits.alpha:
            return room
        return max(room, limits.quorum - self._num_answered() - num_under_way)

    def _window(self) -> Iterable[PeerNode]:
        return itertools.islice(self._heap, self._limits.window)

    def _fresh(self) -> list[Contact]:
        return [node.contact for node in self._window() if self._state(node) is _State.FRESH]

    def _num_answered(self) -> int:
        return sum(self._state(node) is _State.ANSWERED for node in self._window())

    def _state(self, node: PeerNode) -> _State:
        return self._states[node.contact.peer_id]
