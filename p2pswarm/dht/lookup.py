"""The course of one lookup: whom to ask next on the way to the nodes closest to a target, and when to stop.

Sans-IO: facts in (`answered`, `failed`, `advance`), decisions out (`next_to_ask`, `is_finished`). `dht/node.py` carries
them out. It differs from the Kademlia paper in two ways:

- Loosely parallel: a request without an answer after `slow_after_s` no longer holds a place among the `alpha`, nor does
  the end wait for it as long as enough others are left; if its answer comes in time, it counts.
- Once `alpha` answers in a row have brought nothing closer, all that is left of the closest `width` is asked at once.

It ends when the closest `width` nodes that are neither dead nor slow have answered.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from kademlia.node import NodeHeap

from p2pswarm.core.ids import PeerId
from p2pswarm.dht.contact import Contact, PeerNode, TargetNode, node_id_of


@dataclass(frozen=True, slots=True)
class LookupLimits:
    """How wide and how far one lookup goes."""

    k: int
    alpha: int
    width: int
    max_requests: int
    slow_after_s: float


class _State(Enum):
    FRESH = "fresh"
    ASKED = "asked"
    SLOW = "slow"
    ANSWERED = "answered"
    FAILED = "failed"


class Lookup:
    """One walk towards `target_id`; the times are the caller's."""

    def __init__(self, target_id: bytes, start: Iterable[Contact], own_peer_id: PeerId, limits: LookupLimits) -> None:
        self._limits = limits
        self._target = TargetNode(target_id)
        self._candidates = NodeHeap(self._target, limits.k)
        self._own_peer_id = own_peer_id
        self._states: dict[PeerId, _State] = {}
        self._nodes: dict[PeerId, PeerNode] = {}
        self._slow_at_s: dict[PeerId, float] = {}
        self._closest_distance: float = math.inf
        self._answers_without_gain = 0
        self.num_requests = 0
        for contact in start:
            self._meet(contact)

    def next_to_ask(self, now_s: float) -> list[Contact]:
        """The contacts to ask now, each named once; the caller reports each with `answered` or `failed`."""
        room = min(self._parallelism() - len(self._slow_at_s), self._limits.max_requests - self.num_requests)
        chosen = [node for node in self._closest() if self._state(node) is _State.FRESH][: max(0, room)]
        for node in chosen:
            self._states[node.contact.peer_id] = _State.ASKED
            self._slow_at_s[node.contact.peer_id] = now_s + self._limits.slow_after_s
        self.num_requests += len(chosen)
        return [node.contact for node in chosen]

    def answered(self, peer_id: PeerId, contacts: Iterable[Contact]) -> None:
        """The peer answered, and named these contacts."""
        self._slow_at_s.pop(peer_id, None)
        self._states[peer_id] = _State.ANSWERED
        self._candidates.push(self._nodes[peer_id])
        gained = [self._meet(contact) for contact in contacts]
        self._answers_without_gain = 0 if any(gained) else self._answers_without_gain + 1

    def failed(self, peer_id: PeerId) -> None:
        """The peer did not answer, or not in a way that makes sense."""
        self._slow_at_s.pop(peer_id, None)
        self._states[peer_id] = _State.FAILED
        self._candidates.remove([node_id_of(peer_id)])

    def advance(self, now_s: float) -> None:
        """Lets go of the requests that have taken too long."""
        for peer_id in [peer_id for peer_id, slow_at_s in self._slow_at_s.items() if slow_at_s <= now_s]:
            del self._slow_at_s[peer_id]
            self._states[peer_id] = _State.SLOW
            self._candidates.remove([node_id_of(peer_id)])

    @property
    def wake_at_s(self) -> float:
        """When `advance` has something to do."""
        return min(self._slow_at_s.values(), default=math.inf)

    @property
    def is_finished(self) -> bool:
        closest = self._closest()
        if any(self._state(node) is _State.ASKED for node in closest):
            return False
        if self.num_requests < self._limits.max_requests:
            if any(self._state(node) is _State.FRESH for node in closest):
                return False
            if len(closest) < self._limits.width:
                return not any(state in (_State.ASKED, _State.SLOW) for state in self._states.values())
        return True

    def closest_answered(self) -> list[Contact]:
        """Up to k contacts that answered, the closest first."""
        return [node.contact for node in self._candidates if self._state(node) is _State.ANSWERED]

    def _meet(self, contact: Contact) -> bool:
        """Takes up a contact not heard of before; True where none came closer yet."""
        if contact.peer_id == self._own_peer_id or contact.peer_id in self._states:
            return False
        node = PeerNode(contact)
        self._states[contact.peer_id] = _State.FRESH
        self._nodes[contact.peer_id] = node
        self._candidates.push(node)
        distance: int = self._target.distance_to(node)
        is_closest = distance < self._closest_distance
        self._closest_distance = min(distance, self._closest_distance)
        return is_closest

    def _closest(self) -> list[PeerNode]:
        return list(self._candidates)[: self._limits.width]

    def _state(self, node: PeerNode) -> _State:
        return self._states[node.contact.peer_id]

    def _parallelism(self) -> int:
        is_final = self._answers_without_gain >= self._limits.alpha
        return max(self._limits.alpha, self._limits.width) if is_final else self._limits.alpha
