"""Member lists between nodes of a simulated network."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Network
from p2pswarm.net.private.member_exchange import MEMBERS_PROTOCOL, TELL_REMOVED_TIMEOUT_S, MemberExchange
from p2pswarm.net.private.member_list import MAX_LIST_BYTES, MemberList
from p2pswarm.net.private.members import Members
from p2pswarm.testing.memory_network import Link, MemoryNetwork

OWNER = Identity.generate(bytes([9]) * 32)
LATENCY_S = 0.025
ROUND_TRIPS_PER_HOP = 2.5
"""One for the stream, a half for the list, one for its end."""


@dataclass(frozen=True)
class Member:
    network: Network
    members: Members


@asynccontextmanager
async def chain_of(num_nodes: int, memory: MemoryNetwork) -> AsyncIterator[Sequence[Member]]:
    """Each is connected to the next; none knows a list."""
    async with AsyncExitStack() as stack:
        networks = [await stack.enter_async_context(memory.node(number)) for number in range(num_nodes)]
        nodes = [Member(network, Members(OWNER.peer_id)) for network in networks]
        nursery = await stack.enter_async_context(trio.open_nursery())
        for node in nodes:
            nursery.start_soon(MemberExchange(node.network, node.members).run)
        for one, other in pairwise(networks):
            await one.connect(other.addresses[0])
        await trio.testing.wait_all_tasks_blocked()
        yield nodes
        nursery.cancel_scope.cancel()


@pytest.fixture
def memory() -> MemoryNetwork:
    return MemoryNetwork(random.Random(61), Link(latency_s=LATENCY_S))


def listing(version: int, nodes: Sequence[Member]) -> MemberList:
    return MemberList.sign(OWNER, version, [node.network.peer_id for node in nodes])


async def test_list_goes_from_node_to_node(memory: MemoryNetwork, autojump_clock: MockClock) -> None:
    async with chain_of(6, memory) as nodes:
        nodes[0].members.take(listing(1, nodes))
        with trio.fail_after(5 * ROUND_TRIPS_PER_HOP * 2 * LATENCY_S):
            await nodes[-1].members.wait_newer_than(0)
        assert all(node.network.connected_peers for node in nodes)


async def test_removed_node_hears_of_it_and_loses_its_connections(
    memory: MemoryNetwork, autojump_clock: MockClock
) -> None:
    async with chain_of(3, memory) as (first, removed, last):
        first.members.take(listing(1, [first, last]))
        await trio.sleep(1)
        assert removed.members.version == 1
        assert last.members.version == 1
        assert not any(node.network.connected_peers for node in (first, removed, last))


async def test_removed_node_that_hangs_is_not_waited_for(memory: MemoryNetwork, autojump_clock: MockClock) -> None:
    async with chain_of(2, memory) as (first, removed):
        memory.hang(removed.network.peer_id)
        first.members.take(listing(1, [first]))
        await trio.sleep(TELL_REMOVED_TIMEOUT_S + 0.01)
        assert not first.network.connected_peers


@pytest.mark.parametrize("text", [b"rubbish", bytes(MAX_LIST_BYTES + 1)], ids=["rubbish", "endless"])
async def test_what_is_no_list_changes_nothing(text: bytes, memory: MemoryNetwork, autojump_clock: MockClock) -> None:
    async with chain_of(2, memory) as (first, second):
        stream = await second.network.open_stream(first.network.peer_id, MEMBERS_PROTOCOL)
        await stream.write(text)
        await stream.close_write()
        await trio.sleep(1)
        assert first.members.newest is None
        assert first.network.connected_peers
