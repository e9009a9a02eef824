"""Many DHT nodes over one `MemoryNetwork`: for tests and simulations of whatever rests on the DHT.

async with open_dht_world(seed=7) as world:
    first = await world.add()
    second = await world.add(via=[first])
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import trio

from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.node import DEFAULT_CONFIG, DhtNode
from p2pswarm.testing.memory_network import DEFAULT_LINK, Link, MemoryNetwork
from p2pswarm.testing.memory_node import MemoryNode
from p2pswarm.testing.simulated_clock import SimulatedClock


@dataclass(frozen=True, slots=True)
class DhtMember:
    """One node and the machine it runs on."""

    network: MemoryNode
    dht: DhtNode
    scope: trio.CancelScope
    """Cancel it to stop the node in order."""


class DhtWorld:
    """The nodes, in the order they came, and what they live in."""

    def __init__(self, memory: MemoryNetwork, clock: SimulatedClock, random: Random, nursery: trio.Nursery) -> None:
        self.memory = memory
        self.clock = clock
        self.random = random
        self.members: list[DhtMember] = []
        self._nursery = nursery
        self.num_identities = 0

    async def add(
        self,
        via: Sequence[DhtMember] = (),
        *,
        identity: int | None = None,
        config: DhtConfig = DEFAULT_CONFIG,
        listens: bool = True,
        known_peers_path: Path | None = None,
    ) -> DhtMember:
        """A new node, which has joined by way of the given ones; the same `identity` number is the same peer id."""
        if identity is None:
            self.num_identities += 1
            identity = self.num_identities
        member: DhtMember = await self._nursery.start(self._live, identity, config, listens, known_peers_path)
        self.members.append(member)
        await member.dht.bootstrap([peer.network.addresses[0] for peer in via])
        return member

    async def _live(
        self,
        identity: int,
        config: DhtConfig,
        listens: bool,
        known_peers_path: Path | None,
        task_status: trio.TaskStatus[DhtMember],
    ) -> None:
        with trio.CancelScope() as scope:
            async with self.memory.node(identity, listens=listens) as network, trio.open_nursery() as nursery:
                dht = DhtNode(network, self.clock, Random(self.random.random()), config, known_peers_path)
                await nursery.start(dht.run)
                task_status.started(DhtMember(network, dht, scope))


@asynccontextmanager
async def open_dht_world(seed: int, link: Link = DEFAULT_LINK) -> AsyncIterator[DhtWorld]:
    """A world without nodes yet; all of them end with it."""
    random = Random(seed)
    async with open_transparent_nursery() as nursery:
        yield DhtWorld(MemoryNetwork(Random(random.random()), link), SimulatedClock(), random, nursery)
        nursery.cancel_scope.cancel()
