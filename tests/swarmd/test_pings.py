"""Servers over simulated links measure their neighbours, and announce figures that are right."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random

import pytest
import trio
from fixed_reach import FixedReach
from trio.testing import MockClock

from p2pswarm.core.ids import PeerId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.dht.node import DhtNode
from p2pswarm.directory.announcer import Announcer
from p2pswarm.directory.directory import Directory
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.testing.memory_node import MemoryNode
from p2pswarm.testing.running_sum_service import SUM_MODEL
from p2pswarm.testing.simulated_clock import SimulatedClock
from p2pswarm.wire.messages import InfoReply
from swarmd.figures import Figures
from swarmd.next_servers import LIFETIME_S
from swarmd.pings import PERIOD_S, Pings
from swarmd.presence import Presence

FIRST, NEAR, FAR = 0, 1, 2
SPANS = (Span(0, 10), Span(10, 20), Span(10, 20))
SETTLED_S = 3 * PERIOD_S


@dataclass
class NoRoom:
    tokens_left: int = 0
    total_tokens: int = 0


@dataclass
class IdleDevice:
    queue_delay_s: float = 0.0


class InfoOnly:
    """A service that is asked nothing but what it serves."""

    def __init__(self, info: ServerInfo) -> None:
        self._info = info

    async def info(self, peer_id: PeerId) -> InfoReply:
        return InfoReply(self._info)


@dataclass
class World:
    memory: MemoryNetwork
    nodes: list[MemoryNode]
    directory: Directory
    """As the first server reads it."""
    presences: list[Presence]

    def set_latency(self, one: int, other: int, latency_s: float) -> None:
        self.memory.set_link(self.nodes[one].peer_id, self.nodes[other].peer_id, Link(latency_s))

    async def announced_by(self, number: int) -> dict[int, float]:
        """The round trips that the swarm can read, by number of the server."""
        servers = await self.directory.servers(SUM_MODEL)
        numbers = {node.peer_id: number for number, node in enumerate(self.nodes)}
        info = servers[self.nodes[number].peer_id]
        return {numbers[peer_id]: round_trip_s for peer_id, round_trip_s in info.next_rtts_s.items()}


@asynccontextmanager
async def open_servers() -> AsyncIterator[World]:
    """One server of the first blocks and two of the next ones, as `swarmd/serve.py` puts them together."""
    memory = MemoryNetwork(Random(3), Link(latency_s=0.01))
    clock = SimulatedClock()
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(open_transparent_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        nodes = [await stack.enter_async_context(memory.node(number + 1)) for number in range(len(SPANS))]
        dhts = [DhtNode(node, clock, Random(number)) for number, node in enumerate(nodes)]
        directories = [Directory(dht, clock, Random(number)) for number, dht in enumerate(dhts)]
        world = World(memory, nodes, directories[FIRST], [])
        world.set_latency(FIRST, NEAR, 0.005)
        world.set_latency(FIRST, FAR, 0.08)
        for number, (node, dht, span) in enumerate(zip(nodes, dhts, SPANS, strict=True)):
            await nursery.start(dht.run)
            await dht.bootstrap(nodes[FIRST].addresses if number else ())
            info = ServerInfo(
                node.peer_id, SUM_MODEL, span, ServerState.ONLINE, node.addresses, 20, 1.0, 1.0, 1.0, 1.0, "float32"
            )
            announcer = Announcer(dht, node, clock, Random(number))
            nursery.start_soon(announcer.run)
            presence = Presence(announcer, info, FixedReach())
            world.presences.append(presence)
            pings = Pings(info, node, RpcClient(node), Random(number))
            await nursery.start(RpcServer(node, InfoOnly(info)).run)
            await presence.announce(info)
            figures = Figures(NoRoom(), IdleDevice(), pings, at_speed=lambda info: info)
            nursery.start_soon(presence.follow_figures, figures)
            nursery.start_soon(_follow, directories[number], pings)
        yield world


async def _follow(directory: Directory, pings: Pings) -> None:
    async with directory.watch(SUM_MODEL, PERIOD_S) as view:
        await pings.follow(view)


async def test_what_a_server_announces_is_how_far_its_neighbours_are(autojump_clock: MockClock) -> None:
    async with open_servers() as world:
        await trio.sleep(SETTLED_S)
        assert await world.announced_by(FIRST) == {NEAR: pytest.approx(0.01), FAR: pytest.approx(0.16)}
        assert await world.announced_by(NEAR) == {}


async def test_a_link_that_gets_slower_is_announced_anew_and_noise_is_not(autojump_clock: MockClock) -> None:
    async with open_servers() as world:
        await trio.sleep(SETTLED_S)
        before = world.presences[FIRST].info
        world.set_latency(FIRST, FAR, 0.09)
        await trio.sleep(20 * PERIOD_S)
        assert world.presences[FIRST].info is before
        world.set_latency(FIRST, FAR, 0.3)
        await trio.sleep(30 * PERIOD_S)
        assert await world.announced_by(FIRST) == {NEAR: pytest.approx(0.01), FAR: pytest.approx(0.6, rel=0.2)}


async def test_a_neighbour_that_dies_is_left_out(autojump_clock: MockClock) -> None:
    async with open_servers() as world:
        await trio.sleep(SETTLED_S)
        world.memory.kill(world.nodes[NEAR].peer_id)
        await trio.sleep(LIFETIME_S + SETTLED_S)
        assert await world.announced_by(FIRST) == {FAR: pytest.approx(0.16)}


async def test_a_neighbour_that_hangs_holds_nobody_up(autojump_clock: MockClock) -> None:
    async with open_servers() as world:
        world.memory.hang(world.nodes[NEAR].peer_id)
        await trio.sleep(SETTLED_S)
        announced = await world.announced_by(FIRST)
        assert announced[FAR] == pytest.approx(0.16)
        await trio.sleep(LIFETIME_S)
        assert NEAR not in await world.announced_by(FIRST)
