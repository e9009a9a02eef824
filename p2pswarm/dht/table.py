"""The routing table: which nodes we know, sorted into buckets by distance, on the `kademlia` package's structures.

The package's own table starts asyncio tasks when a bucket is full, and reads the process's clock. Here `PeerTable.seen`
hands back the contact that stands in the way, for the node to ask, and the times are the caller's. Its search for
neighbours takes what comes first from the buckets left and right; here it is exact.
"""

import heapq
from collections.abc import Iterator
from itertools import chain
from random import Random
from typing import Any

from kademlia.routing import KBucket, RoutingTable

from p2pswarm.core.ids import PeerId
from p2pswarm.dht.contact import ID_BITS, ID_BYTES, Contact, PeerNode, TargetNode, node_id_of

SPLIT_DEPTH = 5
"""Buckets are split until their contacts share this many bits (or a multiple), as section 4.2 of the Kademlia paper
advises: each hop of a lookup then gains at least as many, at the price of a table that holds up to 32 times k nodes a
level."""


class Bucket(KBucket):  # type: ignore[misc]  # the package has no types
    """A package bucket that knows when it was refreshed instead of when it was touched."""

    def __init__(self, range_lower: int, range_upper: int, k: int) -> None:
        self.refreshed_at_s = float("-inf")
        super().__init__(range_lower, range_upper, k)

    def touch_last_updated(self) -> None:
        """Nothing: the package would read the process's clock here."""

    def split(self) -> tuple["Bucket", "Bucket"]:
        middle = (self.range[0] + self.range[1]) // 2
        lower, upper = Bucket(self.range[0], middle, self.ksize), Bucket(middle + 1, self.range[1], self.ksize)
        for node in chain(self.nodes.values(), self.replacement_nodes.values()):
            (lower if node.long_id <= middle else upper).add_node(node)
        lower.refreshed_at_s = upper.refreshed_at_s = self.refreshed_at_s
        return lower, upper


class PeerTable(RoutingTable):  # type: ignore[misc]  # the package has no types
    """Contacts by distance from our own id; never ourselves."""

    def __init__(self, own_id: bytes, k: int) -> None:
        self.buckets: list[Bucket] = []
        super().__init__(None, k, TargetNode(own_id))

    def flush(self) -> None:
        """Forgets everyone."""
        self.buckets = [Bucket(0, 2**ID_BITS - 1, self.ksize)]

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self.buckets)

    def __contains__(self, peer_id: PeerId) -> bool:
        node_id = node_id_of(peer_id)
        return node_id in self._bucket_of(node_id).nodes

    def contacts(self) -> Iterator[Contact]:
        return (node.contact for node in self._nodes())

    def seen(self, contact: Contact, now_s: float) -> PeerNode | None:
        """Notes a sign of life of the contact.

        Returns the least recently seen node of its bucket where that is full: if it does not answer, `remove` it, and
        the newcomer (or one after it) moves up.
        """
        before = self._find(contact.peer_id)
        node = PeerNode(contact, now_s if before is None else before.came_at_s, now_s)
        if node.id == self.node.id:
            return None
        while True:
            bucket = self._bucket_of(node.id)
            if bucket.add_node(node):
                return None
            if not bucket.has_in_range(self.node) and bucket.depth() % SPLIT_DEPTH == 0:
                head: PeerNode = bucket.head()
                return head
            self.split_bucket(self.buckets.index(bucket))

    def came_before(self, moment_s: float) -> list[Contact]:
        """The contacts that have been known since then, or longer."""
        return [node.contact for node in self._nodes() if node.came_at_s <= moment_s]

    def remove(self, peer_id: PeerId) -> None:
        """Forgets the contact, if it is known; a replacement moves up."""
        node = self._find(peer_id)
        if node is not None:
            self._bucket_of(node.id).remove_node(node)

    def closest(self, target_id: bytes, count: int) -> list[Contact]:
        """The `count` known contacts closest to the target, the closest first."""
        target = int.from_bytes(target_id, "big")
        nodes: list[PeerNode] = heapq.nsmallest(count, self._nodes(), key=lambda node: node.long_id ^ target)
        return [node.contact for node in nodes]

    def stalest_bucket(self) -> Bucket:
        """The bucket whose last refresh is longest ago."""
        return min(self.buckets, key=lambda bucket: bucket.refreshed_at_s)

    def _find(self, peer_id: PeerId) -> PeerNode | None:
        node_id = node_id_of(peer_id)
        bucket = self._bucket_of(node_id)
        node: PeerNode | None = bucket.nodes.get(node_id) or bucket.replacement_nodes.get(node_id)
        return node

    def _bucket_of(self, node_id: bytes) -> Bucket:
        long_id = int.from_bytes(node_id, "big")
        return next(bucket for bucket in self.buckets if long_id <= bucket.range[1])

    def _nodes(self) -> Iterator[Any]:
        return chain.from_iterable(bucket.nodes.values() for bucket in self.buckets)


def random_id_in(bucket: Bucket, random: Random) -> bytes:
    """A point of the id space that falls into the bucket."""
    return random.randint(bucket.range[0], bucket.range[1]).to_bytes(ID_BYTES, "big")


def oldest_contact(bucket: Bucket) -> Contact | None:
    """The bucket's least recently seen contact."""
    node: PeerNode | None = next(iter(bucket.nodes.values()), None)
    return None if node is None else node.contact
