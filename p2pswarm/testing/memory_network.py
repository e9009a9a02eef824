"""A network without sockets: many nodes in one process, on trio's clock, over links as bad as a test wants.

With `autojump_clock` an hour of a swarm of hundreds passes in seconds. A node behaves as one over `net/host.py` does,
and passes the same contract (`testing/network_contract.py`): what costs a round trip there costs one here. Not
simulated: the time that computing takes, and connections that compete for one machine's uplink (each has its own link).

A lost packet comes late, as over TCP. A path that is cut holds what is sent until it is mended, or until the keep-alive
gives the connection up, 25 s later with the default settings.

    memory = MemoryNetwork(random.Random(7), Link(latency_s=0.025))
    async with memory.node(1) as alice, memory.node(2) as bob:
        await alice.connect(bob.addresses[0])
        memory.hang(bob.peer_id)
"""

import contextlib
import random
from collections.abc import AsyncIterator, Collection, Iterable

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.net.config import DEFAULT_CONFIG, NetworkConfig
from p2pswarm.net.identity import Identity
from p2pswarm.testing.memory_connection import Link
from p2pswarm.testing.memory_node import MemoryNode

__all__ = ["DEFAULT_LINK", "Link", "MemoryNetwork"]

DEFAULT_LINK = Link()


class MemoryNetwork:
    """The world that simulated nodes live in, and the hand that cuts its cables."""

    def __init__(
        self, randomness: random.Random, default_link: Link = DEFAULT_LINK, config: NetworkConfig = DEFAULT_CONFIG
    ) -> None:
        self._random = randomness
        self._default_link = default_link
        self._config = config
        self._links: dict[frozenset[PeerId], Link] = {}
        self._groups: dict[PeerId, int] = {}
        self._nodes: dict[str, MemoryNode] = {}
        self._next_host = 1

    @contextlib.asynccontextmanager
    async def node(self, identity: Identity | int, *, listens: bool = True) -> AsyncIterator[MemoryNode]:
        """A running node; a whole number stands for the identity made from it. Without `listens` nobody can dial it."""
        if isinstance(identity, int):
            identity = Identity.generate(identity.to_bytes(32, "big"))
        transport = self._new_transport()
        async with open_transparent_nursery() as nursery:
            node = MemoryNode(self, identity, transport if listens else None, self._config, self._random, nursery)
            self._nodes[transport] = node
            await nursery.start(node.run)
            try:
                yield node
            finally:
                node.shut_down()
                nursery.cancel_scope.cancel()

    def _new_transport(self) -> str:
        number = self._next_host
        self._next_host += 1
        return f"/ip4/10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}/tcp/4001"

    def set_link(self, one: PeerId, other: PeerId, link: Link) -> None:
        """The path between these two from now on."""
        self._links[frozenset((one, other))] = link
        self._refresh()

    def link(self, one: PeerId, other: PeerId) -> Link:
        return self._links.get(frozenset((one, other)), self._default_link)

    def partition(self, groups: Iterable[Collection[PeerId]]) -> None:
        """Cuts every path between peers of different groups; peers in no group form one more."""
        self._groups = {peer_id: index for index, group in enumerate(groups) for peer_id in group}
        self._refresh()

    def heal(self) -> None:
        """Mends all paths; what was sent and not given up meanwhile arrives, as TCP would have it."""
        self._groups = {}
        self._refresh()

    def is_cut(self, one: PeerId, other: PeerId) -> bool:
        return self._groups.get(one, -1) != self._groups.get(other, -1)

    def kill(self, peer_id: PeerId) -> None:
        """Ends the node as SIGKILL does: connections break, dials are refused, its handlers stop.

        The caller's own tasks go on, and get `ConnectionLost` from everything they try.
        """
        self._living(peer_id).kill()

    def hang(self, peer_id: PeerId) -> None:
        """Stops the node as SIGSTOP does: nothing comes in or goes out, and its kernel still accepts connections."""
        self._living(peer_id).hang()
        self._refresh()

    def resume(self, peer_id: PeerId) -> None:
        """Lets a hung node go on where it was."""
        self._living(peer_id).resume()
        self._refresh()

    def _living(self, peer_id: PeerId) -> MemoryNode:
        for node in self._nodes.values():
            if node.peer_id == peer_id and node.is_running:
                return node
        raise ConfigError(f"no node {peer_id} runs in this network")

    def _refresh(self) -> None:
        for node in self._nodes.values():
            node.refresh_links()

    def at(self, transport: str) -> MemoryNode | None:
        """The node that listens there, dead or alive."""
        node = self._nodes.get(transport)
        return node if node is not None and node.own_listen_addresses() else None
