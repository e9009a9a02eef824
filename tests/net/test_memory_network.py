"""What the simulated network adds to the contract: time, thin and lossy links, cuts, and nodes that hang or die."""

import random

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import ConfigError, ConnectionLost, PeerUnreachable
from p2pswarm.core.ids import PeerId
from p2pswarm.net.network import Network, Stream
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.testing.network_contract import ECHO, HOLD, echo, hold, read_exactly
from p2pswarm.testing.simulated_clock import SimulatedClock


@pytest.fixture
def memory() -> MemoryNetwork:
    return MemoryNetwork(random.Random(51), Link(latency_s=0.025))


async def open_echo(client: Network, server: Network) -> Stream:
    server.serve(ECHO, echo)
    await client.connect(server.addresses[0])
    return await client.open_stream(server.peer_id, ECHO)


async def seconds_for_echo(stream: Stream, num_bytes: int = 4) -> float:
    started_s = trio.current_time()
    await stream.write(bytes(num_bytes))
    await read_exactly(stream, num_bytes)
    return trio.current_time() - started_s


async def test_an_echo_takes_one_round_trip(memory: MemoryNetwork, autojump_clock: MockClock) -> None:
    async with memory.node(1) as alice, memory.node(2) as bob:
        stream = await open_echo(alice, bob)
        assert await seconds_for_echo(stream) == pytest.approx(0.05)
        assert alice.round_trip_s(bob.peer_id) == 0.05


async def test_opening_costs_the_round_trips_of_the_real_network(
    memory: MemoryNetwork, autojump_clock: MockClock
) -> None:
    async with memory.node(1) as alice, memory.node(2) as bob:
        bob.serve(ECHO, echo)
        started_s = trio.current_time()
        await alice.connect(bob.addresses[0])
        assert trio.current_time() - started_s == pytest.approx(6.5 * 0.05)
        started_s = trio.current_time()
        await alice.open_stream(bob.peer_id, ECHO)
        assert trio.current_time() - started_s == pytest.approx(0.05)


async def test_bandwidth_is_shared_by_the_streams_of_a_link(memory: MemoryNetwork, autojump_clock: MockClock) -> None:
    async with memory.node(1) as alice, memory.node(2) as bob:
        memory.set_link(alice.peer_id, bob.peer_id, Link(latency_s=0.01, bandwidth_bytes_per_s=1e6))
        streams = [await open_echo(alice, bob) for _ in range(4)]
        started_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(seconds_for_echo, stream, 250_000)
        assert trio.current_time() - started_s == pytest.approx(1.0, rel=0.15)


async def test_lost_packets_come_late_but_in_order(autojump_clock: MockClock) -> None:
    memory = MemoryNetwork(random.Random(52), Link(latency_s=0.01, loss=0.1))
    async with memory.node(1) as alice, memory.node(2) as bob:
        stream = await open_echo(alice, bob)
        times_s = [await seconds_for_echo(stream) for _ in range(200)]
        assert min(times_s) == pytest.approx(0.02)
        assert 20 < sum(time_s > 0.2 for time_s in times_s) < 80
        await stream.write(b"".join(bytes([number]) * 1000 for number in range(200)))
        received = await read_exactly(stream, 200_000)
        assert received == b"".join(bytes([number]) * 1000 for number in range(200))


async def test_cut_that_heals_in_time_loses_nothing(memory: MemoryNetwork, autojump_clock: MockClock) -> None:
    async with memory.node(1) as alice, memory.node(2) as bob:
        stream = await open_echo(alice, bob)
        memory.partition([[alice.peer_id]])
        await stream.write(b"through the cut")
        with trio.move_on_after(10) as scope:
            await stream.read()
        assert scope.cancelled_caught
        memory.heal()
        assert await read_exactly(stream, 15) == b"through the cut"


async def test_cut_that_lasts_ends_connections_at_both_ends(memory: MemoryNetwork, autojump_clock: MockClock) -> None:
    async with memory.node(1) as alice, memory.node(2) as bob, memory.node(3) as carol:
        stream = await open_echo(alice, bob)
        inside = await open_echo(carol, bob)
        memory.partition([[alice.peer_id], [bob.peer_id, carol.peer_id]])
        started_s = trio.current_time()
        with pytest.raises(ConnectionLost):
            await stream.read()
        assert trio.current_time() - started_s == pytest.approx(25)
        assert alice.connected_peers == frozenset()
        assert bob.connected_peers == {carol.peer_id}
        with pytest.raises(PeerUnreachable):
            await alice.open_stream(bob.peer_id, ECHO)
        await seconds_for_echo(inside)
        memory.heal()
        await seconds_for_echo(await alice.open_stream(bob.peer_id, ECHO))


async def test_hung_node_is_dropped_and_comes_back(memory: MemoryNetwork, autojump_clock: MockClock) -> None:
    async with memory.node(1) as alice, memory.node(2) as bob:
        stream = await open_echo(alice, bob)
        memory.hang(bob.peer_id)
        started_s = trio.current_time()
        with pytest.raises(ConnectionLost):
            await stream.read()
        assert trio.current_time() - started_s == pytest.approx(25)
        with pytest.raises(PeerUnreachable):
            await alice.open_stream(bob.peer_id, ECHO)
        memory.resume(bob.peer_id)
        await seconds_for_echo(await alice.open_stream(bob.peer_id, ECHO))


async def test_node_that_hangs_for_a_moment_keeps_its_connections(
    memory: MemoryNetwork, autojump_clock: MockClock
) -> None:
    async with memory.node(1) as alice, memory.node(2) as bob:
        stream = await open_echo(alice, bob)
        memory.hang(bob.peer_id)
        await stream.write(b"wait")
        await trio.sleep(20)
        memory.resume(bob.peer_id)
        assert await read_exactly(stream, 4) == b"wait"
        await trio.sleep(60)
        assert bob.peer_id in alice.connected_peers


async def test_killed_node_breaks_connections_at_once_and_refuses_dials(
    memory: MemoryNetwork, autojump_clock: MockClock
) -> None:
    async with memory.node(1) as alice, memory.node(2) as bob:
        bob.serve(HOLD, hold)
        stream = await open_echo(alice, bob)
        memory.kill(bob.peer_id)
        started_s = trio.current_time()
        with pytest.raises(ConnectionLost):
            await stream.read()
        assert trio.current_time() - started_s < 0.1
        with pytest.raises(PeerUnreachable):
            await alice.open_stream(bob.peer_id, ECHO)
        with pytest.raises(ConnectionLost):
            await bob.open_stream(alice.peer_id, ECHO)
        with pytest.raises(ConfigError, match="no node"):
            memory.kill(bob.peer_id)


async def test_node_that_was_killed_can_be_started_again_under_its_name(
    memory: MemoryNetwork, autojump_clock: MockClock
) -> None:
    async with memory.node(1) as alice:
        async with memory.node(2) as bob:
            await open_echo(alice, bob)
            memory.kill(bob.peer_id)
        await trio.sleep(1)
        async with memory.node(2) as bob_again:
            await seconds_for_echo(await open_echo(alice, bob_again))


async def test_node_that_does_not_listen_dials_but_is_not_dialled(
    memory: MemoryNetwork, autojump_clock: MockClock
) -> None:
    async with memory.node(1, listens=False) as client, memory.node(2) as server:
        assert client.addresses == ()
        client.serve(ECHO, echo)
        await client.connect(server.addresses[0])
        await seconds_for_echo(await server.open_stream(client.peer_id, ECHO))


async def test_same_seed_gives_the_same_peer(autojump_clock: MockClock) -> None:
    peers: list[PeerId] = []
    for _ in range(2):
        memory = MemoryNetwork(random.Random(0))
        async with memory.node(7) as node:
            peers.append(node.peer_id)
    assert peers[0] == peers[1]


async def test_simulated_clock_follows_the_simulated_time(autojump_clock: MockClock) -> None:
    clock, late = SimulatedClock(1_000.0), SimulatedClock(1_000.0, skew_s=-3.0)
    await trio.sleep(3600)
    assert clock.unix_time_s() == pytest.approx(4600.0)
    assert late.unix_time_s() == pytest.approx(4597.0)


async def test_hundreds_of_nodes_exchange_thousands_of_messages(autojump_clock: MockClock) -> None:
    memory = MemoryNetwork(random.Random(53))
    num_answers = 0

    async def node(number: int, addresses: list[str], are_done: trio.Event) -> None:
        nonlocal num_answers
        async with memory.node(number) as network:
            network.serve(ECHO, echo)
            addresses.append(network.addresses[0])
            await trio.sleep(1)
            randomness = random.Random(number)
            for address in randomness.sample(addresses, 10):
                if address != network.addresses[0]:
                    stream = await network.open_stream(await network.connect(address), ECHO)
                    await seconds_for_echo(stream, 200)
                    stream.reset()
                    num_answers += 1
            await are_done.wait()

    addresses: list[str] = []
    are_done = trio.Event()
    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(node, number, addresses, are_done)
        await trio.sleep(60)
        are_done.set()
    assert num_answers > 1900
