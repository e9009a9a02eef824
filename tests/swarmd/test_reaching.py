"""A node in a swarm finds out how others reach it, and keeps itself reachable: over a simulated network."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import trio

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.reachability import Reachability
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.dht.node import DhtNode
from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.nat.port_mapping import MappedPort
from p2pswarm.net.nat.reachability import CHECK_PERIOD_S, DOUBT_PERIOD_S
from p2pswarm.testing.memory_network import MemoryNetwork
from p2pswarm.testing.memory_node import MemoryNode
from p2pswarm.testing.simulated_clock import SimulatedClock
from swarmd.config import NodeConfig
from swarmd.joining import join
from swarmd.reaching import Reaching

ROUND_S = 2 * CHECK_PERIOD_S
DOUBT_S = 3 * DOUBT_PERIOD_S


@dataclass
class Router:
    """A `PortMapper` without threads, for a router that does as it is told, unless it is of the kind that does not."""

    opens: "World | None" = None
    mapped: MappedPort | None = None
    is_due: bool = False

    async def map(self, port: int) -> MappedPort | None:
        await trio.sleep(1)
        if self.opens is not None:
            self.mapped = MappedPort(port, port)
            self.opens.walled.clear()
        return self.mapped

    async def unmap(self) -> None:
        self.mapped = None


@dataclass
class Member:
    """One node and what it told its operator."""

    network: MemoryNode
    dht: DhtNode
    reaching: Reaching
    events: list[tuple[str, dict[str, Any]]]

    @property
    def relays(self) -> list[str]:
        """By whom others reach it, in order."""
        return [
            address.partition("/p2p-circuit")[0].rpartition("/")[2]
            for address in self.network.addresses
            if "/p2p-circuit" in address
        ]

    def note(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


class World:
    """Nodes, some of which sit behind walls that let nobody in."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.memory = MemoryNetwork(Random(3))
        self.walled: set[PeerId] = set()
        self.router = Router()
        self._nursery = nursery
        self._num_members = 0

    async def add(self, *peers: Member, is_walled: bool = False, **settings: Any) -> Member:
        self._num_members += 1
        member: Member = await self._nursery.start(self._live, self._num_members, settings)
        if is_walled:
            self.walled.add(member.network.peer_id)
        addresses = [peer.network.addresses[0] for peer in peers]
        await join(
            addresses, member.dht, member.reaching, lambda event, **fields: member.events.append((event, fields))
        )
        return member

    async def _live(self, number: int, settings: dict[str, Any], task_status: trio.TaskStatus[Member]) -> None:
        clock, random = SimulatedClock(), Random(number)
        events: list[tuple[str, dict[str, Any]]] = []
        async with self.memory.node(number) as node, trio.open_nursery() as nursery:
            self._wall_off(node)
            dht = DhtNode(node, clock, random)
            await nursery.start(dht.run)
            reaching = Reaching(
                NodeConfig(**settings),
                node,
                dht,
                clock,
                random,
                lambda event, **fields: events.append((event, fields)),
                lambda _: self.router,  # type: ignore[arg-type,return-value]
            )
            await nursery.start(reaching.run)
            task_status.started(Member(node, dht, reaching, events))

    def _wall_off(self, node: MemoryNode) -> None:
        dial_fresh = node.dial_fresh

        async def dial(address: TcpAddress, peer_id: PeerId) -> None:
            if peer_id in self.walled:
                raise ConnectionLost(f"nobody answers at {address}", peer_id)
            await dial_fresh(address, peer_id)

        node.dial_fresh = dial  # type: ignore[method-assign]


@asynccontextmanager
async def open_world() -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery)
        nursery.cancel_scope.cancel()


def info_of(member: Member) -> ServerInfo:
    bare = ServerInfo(
        member.network.peer_id, ModelId("m@0"), Span(0, 1), ServerState.ONLINE, (), 1, 1.0, 1.0, 1.0, 1.0, "float32"
    )
    return member.reaching.stamped(bare)


async def test_the_first_node_of_a_swarm_serves_it_without_knowing(autojump_clock):
    async with open_world() as world:
        first = await world.add()
        assert info_of(first).reachability is Reachability.UNKNOWN
        assert first.dht.serves
        assert first.events == []


async def test_it_knows_as_soon_as_there_are_others(autojump_clock):
    async with open_world() as world:
        first = await world.add()
        second = await world.add(first)
        assert second.names() == ["joined", "reachability"]
        assert second.events[-1][1] == {
            "state": "public",
            "why": "1 of 1 peers got through",
            "addresses": list(second.network.addresses),
        }
        await trio.sleep(DOUBT_S)
        assert info_of(first).reachability is Reachability.PUBLIC
        assert first.dht.serves
        assert second.dht.serves


async def test_who_cannot_be_dialled_is_behind_two_relays_when_it_has_joined_and_a_client_of_the_dht(autojump_clock):
    async with open_world() as world:
        first = await world.add()
        relays = [first, await world.add(first), await world.add(first)]
        hidden = await world.add(first, is_walled=True)
        await trio.sleep(1)
        info = info_of(hidden)
        assert (info.reachability, info.using_relay) == (Reachability.PRIVATE, True)
        assert info.addresses == hidden.network.addresses
        assert len(set(hidden.relays)) == 2
        assert set(hidden.relays) < {relay.network.peer_id for relay in relays}
        assert not hidden.dht.serves
        assert all(hidden.network.peer_id not in contacts_of(relay) for relay in relays)


async def test_a_server_is_not_announced_before_it_has_a_relay(autojump_clock):
    async with open_world() as world:
        first = await world.add()
        hidden = await world.add(first, is_walled=True)
        assert hidden.relays == [first.network.peer_id]
        assert hidden.names()[-1] == "relay_reserved"


async def test_a_dead_relay_is_replaced_within_two_seconds_and_told(autojump_clock):
    async with open_world() as world:
        first = await world.add()
        await world.add(first), await world.add(first)
        hidden = await world.add(first, is_walled=True)
        await trio.sleep(1)
        dead = hidden.relays[0]
        change = hidden.reaching.next_change
        world.memory.kill(PeerId(dead))
        await trio.sleep(2)
        assert len(hidden.relays) == 2
        assert dead not in hidden.relays
        assert change.is_set()
        assert hidden.names()[-2:] == ["relay_lost", "relay_reserved"]


async def test_without_any_relay_it_goes_on_looking(autojump_clock):
    async with open_world() as world:
        first = await world.add(no_relay=True)
        hidden = await world.add(first, is_walled=True)
        assert (hidden.network.addresses, info_of(hidden).using_relay) == ((), True)
        second = await world.add(first)
        await trio.sleep(ROUND_S)
        assert hidden.relays == [second.network.peer_id]


async def test_a_router_that_forwards_a_port_ends_the_need_of_relays(autojump_clock):
    async with open_world() as world:
        world.router.opens = world
        first = await world.add()
        second = await world.add(first, is_walled=True)
        assert second.relays == [first.network.peer_id]
        await trio.sleep(2)
        assert info_of(second).reachability is Reachability.PUBLIC
        assert world.router.mapped == MappedPort(4001, 4001)
        assert second.relays == []


async def test_a_router_that_has_forgotten_the_port_is_asked_again(autojump_clock):
    async with open_world() as world:
        world.router.opens = world
        first = await world.add()
        second = await world.add(first, is_walled=True)
        await trio.sleep(2)
        world.router.mapped = None
        world.walled.add(second.network.peer_id)
        await trio.sleep(ROUND_S + DOUBT_S)
        assert world.router.mapped == MappedPort(4001, 4001)
        assert info_of(second).reachability is Reachability.PUBLIC
        assert second.relays == []


async def test_the_router_is_not_asked_where_that_is_unwanted(autojump_clock):
    async with open_world() as world:
        world.router.opens = world
        first = await world.add()
        second = await world.add(first, is_walled=True, no_upnp=True)
        assert world.router.mapped is None
        assert second.relays == [first.network.peer_id]


async def test_who_can_be_dialled_again_serves_again_and_gives_its_relays_back(autojump_clock):
    async with open_world() as world:
        first = await world.add()
        second = await world.add(first)
        hidden = await world.add(first, is_walled=True)
        world.walled.clear()
        await trio.sleep(ROUND_S)
        assert info_of(hidden).reachability is Reachability.PUBLIC
        assert (hidden.relays, info_of(hidden).using_relay) == ([], False)
        assert hidden.network.peer_id in contacts_of(first) & contacts_of(second)


async def test_who_can_no_longer_be_dialled_finds_out(autojump_clock):
    async with open_world() as world:
        first = await world.add()
        second = await world.add(first)
        third = await world.add(first)
        world.walled.add(third.network.peer_id)
        await trio.sleep(ROUND_S + DOUBT_S)
        assert info_of(third).reachability is Reachability.PRIVATE
        assert set(third.relays) == {first.network.peer_id, second.network.peer_id}
        assert third.network.peer_id not in contacts_of(first) | contacts_of(second)


async def test_the_operators_word_is_taken(autojump_clock):
    async with open_world() as world:
        first = await world.add()
        second = await world.add(first, is_walled=True, public_ip="192.0.2.9")
        await trio.sleep(ROUND_S)
        assert second.network.addresses == (f"/ip4/192.0.2.9/tcp/4001/p2p/{second.network.peer_id}",)
        assert info_of(second).reachability is Reachability.PUBLIC
        assert second.events[-1][1]["why"] == "its operator says so"
        assert second.dht.serves
        assert first.dht.contacts()[0].addresses == second.network.addresses


def contacts_of(member: Member) -> set[str]:
    return {contact.peer_id for contact in member.dht.contacts()}
