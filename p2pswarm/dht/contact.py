"""A contact: a DHT node and where it can be dialled; and the 160-bit ids that say who is close to what.

Ids are 160 bits because the `kademlia` package's tables are. They are hashes, so nobody chooses his place at will.
"""

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from kademlia.node import Node

from p2pswarm.core.ids import PeerId
from p2pswarm.net.addresses import is_dialable

ID_BYTES = 20
ID_BITS = 8 * ID_BYTES
NODE_ID_DOMAIN = b"p2pswarm/dht/node/1\0"
MAX_CONTACT_ADDRESSES = 8
"""A machine with IPv4 and IPv6 on a few interfaces has 4 to 6."""
MAX_CONTACT_LETTERS = 1024
"""Eight IPv6 addresses with their peer ids take 900; an answer with k contacts stays below 24 KiB."""


@dataclass(frozen=True, slots=True)
class Contact:
    """A node that serves others, by its own word."""

    peer_id: PeerId
    addresses: tuple[str, ...]
    """Multiaddrs that end in the peer id; never empty."""


class PeerNode(Node):  # type: ignore[misc]  # the package has no types
    """A contact as the `kademlia` package's tables and heaps know it."""

    def __init__(self, contact: Contact, came_at_s: float = 0.0, seen_at_s: float = 0.0) -> None:
        super().__init__(node_id_of(contact.peer_id))
        self.contact = contact
        self.came_at_s = came_at_s
        """When it was first seen, by whoever keeps it in a table."""
        self.seen_at_s = seen_at_s
        """Its last sign of life."""


class TargetNode(Node):  # type: ignore[misc]  # the package has no types
    """A point in the id space that nobody needs to be at: what a lookup looks for."""

    def __init__(self, target_id: bytes) -> None:
        super().__init__(target_id)


@lru_cache(maxsize=8192)
def node_id_of(peer_id: PeerId) -> bytes:
    """Where a peer sits in the id space."""
    return hashlib.sha256(NODE_ID_DOMAIN + peer_id.encode()).digest()[:ID_BYTES]


def key_id_of(key: bytes) -> bytes:
    """Where a record key, itself a sha256, sits in the id space."""
    return key[:ID_BYTES]


def distance(one: bytes, other: bytes) -> int:
    """Kademlia's: the exclusive or of two ids, as a number."""
    return int.from_bytes(one, "big") ^ int.from_bytes(other, "big")


def closest(contacts: Iterable[Contact], target_id: bytes, count: int) -> list[Contact]:
    """The `count` contacts closest to the target, the closest first."""
    target = int.from_bytes(target_id, "big")
    return heapq.nsmallest(
        count, contacts, key=lambda contact: int.from_bytes(node_id_of(contact.peer_id), "big") ^ target
    )


@lru_cache(maxsize=8192)
def usable_addresses(peer_id: PeerId, addresses: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a stranger's addresses that can be tried: well-formed, the peer's own, and not too many."""
    ending = f"/p2p/{peer_id}"
    usable: list[str] = []
    num_letters = 0
    for address in addresses[:MAX_CONTACT_ADDRESSES]:
        num_letters += len(address)
        if num_letters > MAX_CONTACT_LETTERS:
            break
        if address.endswith(ending) and is_dialable(address):
            usable.append(address)
    return tuple(usable)
