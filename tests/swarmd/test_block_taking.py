"""Servers that start at the same moment, in a swarm that they have just joined, share out the blocks."""

from contextlib import AsyncExitStack
from random import Random

import pytest
import trio
from fixed_reach import FixedReach
from trio.testing import MockClock

from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span, uncovered
from p2pswarm.dht.node import DhtNode
from p2pswarm.directory.announcer import Announcer
from p2pswarm.directory.directory import Directory
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.testing.memory_node import MemoryNode
from p2pswarm.testing.running_sum_service import SUM_MODEL
from p2pswarm.testing.simulated_clock import SimulatedClock
from swarmd.block_taking import take_worst_served
from swarmd.presence import Presence

NUM_MODEL_BLOCKS = 12
STARTED_WITHIN_S = 0.5
"""Longer than a look takes: some see the others, some do not."""


def unmeasured(node: MemoryNode) -> ServerInfo:
    return ServerInfo(
        node.peer_id,
        SUM_MODEL,
        Span(0, NUM_MODEL_BLOCKS),
        ServerState.JOINING,
        node.addresses,
        NUM_MODEL_BLOCKS,
        0.0,
        0.0,
        0.0,
        0.0,
        "float32",
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_servers", "num_blocks"), [(2, 6), (3, 4), (6, 4), (4, 3)])
async def test_no_block_is_left_over(num_servers: int, num_blocks: int, seed: int, autojump_clock: MockClock) -> None:
    random = Random(seed)
    memory = MemoryNetwork(random, Link(latency_s=0.02))
    clock = SimulatedClock()
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(open_transparent_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        nodes = [await stack.enter_async_context(memory.node(random.randrange(1 << 30))) for _ in range(num_servers)]
        presences, directories = [], []
        for node in nodes:
            dht = DhtNode(node, clock, random)
            await nursery.start(dht.run)
            await dht.bootstrap(nodes[0].addresses if node is not nodes[0] else ())
            presences.append(Presence(Announcer(dht, node, clock, random), unmeasured(node), FixedReach()))
            directories.append(Directory(dht, clock, random))

        async def take(presence: Presence, directory: Directory) -> None:
            await trio.sleep(random.uniform(0, STARTED_WITHIN_S))
            await take_worst_served(num_blocks, presence, directory)

        async with trio.open_nursery() as starting:
            for presence, directory in zip(presences, directories, strict=True):
                starting.start_soon(take, presence, directory)
        announced = await directories[0].servers(SUM_MODEL)
        assert {info.peer_id: info.span for info in announced.values()} == {
            presence.info.peer_id: presence.info.span for presence in presences
        }
        assert not uncovered([presence.info.span for presence in presences], Span(0, NUM_MODEL_BLOCKS))
