"""A relay and those it serves, over the simulated network: who gets through, who does not, and what is left of it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from random import Random

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.clock import SystemClock
from p2pswarm.core.errors import ConnectionLost, ProtocolViolation, RelayRefused, SwarmingError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.nat.circuits import CircuitPipe, IncomingCircuits, OpenLane, call
from p2pswarm.net.nat.lanes import TICKET_BYTES, LanePipe
from p2pswarm.net.nat.protobuf_frames import frame
from p2pswarm.net.nat.relay import (
    CONNECT_TIMEOUT_S,
    HOME_LIMITS,
    LANES_TIMEOUT_S,
    LINGER_S,
    REQUEST_TIMEOUT_S,
    Relay,
)
from p2pswarm.net.nat.relay_limits import RelayLimits
from p2pswarm.net.nat.relay_messages import (
    HOP_PROTOCOL,
    LANE_HOP_PROTOCOL,
    LANE_STOP_PROTOCOL,
    STOP_PROTOCOL,
    ConnectRequest,
    RelayAnswer,
    RelayStatus,
    ReserveRequest,
    encode_hop,
    encode_stop,
    read_hop_answer,
    read_hop_request,
    read_stop_request,
)
from p2pswarm.net.nat.reservation import RENEWAL_INTERVAL_S, circuit_addresses, reserve
from p2pswarm.net.network import Stream
from p2pswarm.net.pipe import Pipe
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.testing.memory_node import MemoryNode
from p2pswarm.testing.network_contract import echo, hold, raises, read_all

Handler = Callable[[Stream], Awaitable[None]]


over_both = pytest.mark.parametrize("over", ["streams", "lanes"])
"""What the bytes of circuits go over."""


async def echo_pipe(pipe: Pipe) -> None:
    """Stands for a connection at the far end of a circuit."""
    with suppress(ConnectionLost):
        while data := await pipe.receive_some(1 << 20):
            await pipe.send_all(data)
    await pipe.aclose()


async def take_up(stream: Stream) -> None:
    """The far end of a circuit, like `IncomingCircuits` without lanes; some tests have variants of it."""
    await read_stop_request(stream)
    await stream.write(encode_stop(RelayAnswer(RelayStatus.OK)))
    await echo(stream)


class Scene:
    """A relay, a server that holds a place on it, and a client."""

    def __init__(self, memory: MemoryNetwork, relay_node: MemoryNode, limits: RelayLimits, over: str) -> None:
        self.memory = memory
        self.relay_node = relay_node
        self.hop_protocol = HOP_PROTOCOL if over == "streams" else LANE_HOP_PROTOCOL
        self.relay = Relay(relay_node, SystemClock(), limits)
        self.relay.serve()
        self.pipes: list[Pipe] = []
        self.server: MemoryNode
        self.client: MemoryNode

    async def call(self, target: PeerId | None = None, open_lane: OpenLane | None = None) -> Pipe:
        stream = await self.client.open_stream(self.relay_node.peer_id, self.hop_protocol)
        self.pipes.append(await call(stream, target or self.server.peer_id, open_lane or self.client.open_lane))
        return self.pipes[-1]

    async def assert_nothing_is_left(self) -> None:
        await trio.sleep(1.0)
        assert self.relay.statistics().num_circuits == 0
        is_idle = [not end.streams for ends in self.relay_node._ends.values() for end in ends]
        assert is_idle.count(False) <= self.relay.statistics().num_reservations


@asynccontextmanager
async def scene(
    handler: Handler | None = None,
    limits: RelayLimits = HOME_LIMITS,
    over: str = "streams",
    accept: Callable[[Pipe], Awaitable[None]] = echo_pipe,
) -> AsyncIterator[Scene]:
    """`accept`: what the server makes of circuits. `handler`: of the streams that bring it one, instead."""
    memory = MemoryNetwork(Random(1), Link(latency_s=0.01))
    async with memory.node(1) as relay, memory.node(2) as server, memory.node(3) as client:
        made = Scene(memory, relay, limits, over)
        made.server, made.client = server, client
        circuits = IncomingCircuits(accept, server.open_lane)
        circuits.expect_from(relay.peer_id)
        server.serve(STOP_PROTOCOL if over == "streams" else LANE_STOP_PROTOCOL, handler or circuits.take_up)
        await client.connect(relay.addresses[0])
        server.add_addresses(relay.peer_id, relay.addresses)
        async with trio.open_nursery() as nursery:
            nursery.start_soon((await reserve(server, relay.peer_id)).hold)
            yield made
            for pipe in made.pipes:
                await pipe.aclose()
            nursery.cancel_scope.cancel()


@over_both
async def test_bytes_go_both_ways_and_the_end_of_one_side_arrives(over: str, autojump_clock: MockClock) -> None:
    async with scene(over=over) as world:
        pipe = await world.call()
        assert isinstance(pipe, LanePipe if over == "lanes" else CircuitPipe)
        assert pipe.path.relay == world.relay_node.peer_id
        data = Random(2).randbytes(1_000_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pipe.send_all, data)
            received = b""
            while len(received) < len(data):
                received += await pipe.receive_some(1 << 20)
        assert received == data
        await end_one_side(pipe)
        assert await pipe.receive_some(1) == b""
        assert world.relay.statistics().relayed_bytes == 2 * len(data)
        await world.assert_nothing_is_left()


async def end_one_side(pipe: Pipe) -> None:
    if isinstance(pipe, CircuitPipe):
        await pipe._stream.close_write()
    else:
        assert isinstance(pipe, LanePipe)
        await pipe.send_eof()


async def test_a_circuit_over_streams_ends_with_either_of_its_ends(autojump_clock: MockClock) -> None:
    far_ends: list[Stream] = []
    lost = 0

    async def note(stream: Stream) -> None:
        nonlocal lost
        await read_stop_request(stream)
        await stream.write(encode_stop(RelayAnswer(RelayStatus.OK)))
        far_ends.append(stream)
        try:
            await echo(stream)
        except ConnectionLost:
            lost += 1
            raise

    async with scene(note) as world:
        near = await world.call()
        assert isinstance(near, CircuitPipe)
        await near.send_all(b"hello")
        near._stream.reset()
        await trio.sleep(0.1)
        assert lost == 1
        near = await world.call()
        far_ends[1].reset()
        await raises(ConnectionLost, lambda: near.receive_some(1))
        await world.assert_nothing_is_left()


async def test_a_circuit_over_lanes_ends_with_either_of_them(autojump_clock: MockClock) -> None:
    far_ends: list[Pipe] = []

    async def keep(pipe: Pipe) -> None:
        far_ends.append(pipe)
        await pipe.wait_closed()

    async with scene(accept=keep, over="lanes") as world:
        for leaves, stays in ((0, 1), (1, 0)):
            near = await world.call()
            await trio.sleep(0.1)
            ends = near, far_ends[-1]
            await ends[leaves].send_all(b"the last")
            await ends[leaves].aclose()
            with trio.fail_after(0.1):
                assert await ends[stays].receive_some(100) == b"the last"
                assert await ends[stays].receive_some(100) == b""
            await ends[stays].aclose()
            await world.assert_nothing_is_left()


async def test_a_circuit_over_lanes_ends_with_the_connection_of_an_end_to_the_relay(autojump_clock: MockClock) -> None:
    """A machine that goes without a word leaves its lane open; that its connection has ended is noticed."""
    async with scene(over="lanes") as world:
        pipe = await world.call()
        await world.client.disconnect(world.relay_node.peer_id)
        with trio.fail_after(LINGER_S + 0.1):
            assert await pipe.receive_some(1) == b""
        await world.assert_nothing_is_left()


async def never_open(relay_id: PeerId, ticket: bytes) -> LanePipe:
    raise ConnectionLost(f"{relay_id} does not answer", relay_id)


async def take_for_ever(relay_id: PeerId, ticket: bytes) -> LanePipe:
    await trio.sleep_forever()
    raise AssertionError


@pytest.mark.parametrize("open_lane", [never_open, take_for_ever])
async def test_without_the_lane_of_one_end_a_circuit_has_its_streams(
    open_lane: OpenLane, autojump_clock: MockClock
) -> None:
    async with scene(over="lanes") as world:
        with trio.fail_after(LANES_TIMEOUT_S + 0.5):
            pipe = await world.call(open_lane=open_lane)
        assert isinstance(pipe, CircuitPipe)
        await pipe.send_all(b"hello")
        assert await pipe.receive_some(100) == b"hello"
        assert not world.relay_node._expected_lanes._by_ticket


async def test_an_end_that_knows_only_libp2ps_protocol_is_met_over_streams(autojump_clock: MockClock) -> None:
    for hop, stop in ((LANE_HOP_PROTOCOL, STOP_PROTOCOL), (HOP_PROTOCOL, LANE_STOP_PROTOCOL)):
        async with scene(over="lanes") as world:
            world.hop_protocol = hop
            world.server.serve(STOP_PROTOCOL, world.server._handlers.pop(LANE_STOP_PROTOCOL))
            if stop == LANE_STOP_PROTOCOL:
                world.server.serve(LANE_STOP_PROTOCOL, hold)
            with trio.fail_after(0.5):
                pipe = await world.call()
            assert isinstance(pipe, CircuitPipe)
            await pipe.send_all(b"hello")
            assert await pipe.receive_some(100) == b"hello"


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (b"\2", "where 0 or 1 was due"),
        (b"\1" + bytes(TICKET_BYTES) + b"\1", "a lane is there which is not"),
        (b"\1" + bytes(5), "reset"),
    ],
    ids=["no answer", "a lane that is not there", "half a ticket"],
)
async def test_a_relay_that_talks_nonsense_of_lanes_is_told_apart(
    said: bytes, wanted: str, autojump_clock: MockClock
) -> None:
    async def lie(stream: Stream) -> None:
        await read_hop_request(stream)
        await stream.write(encode_hop(RelayAnswer(RelayStatus.OK)), said)
        await trio.sleep(1)
        stream.reset()

    async with scene(over="lanes") as world:
        world.relay_node.serve(LANE_HOP_PROTOCOL, lie)
        error = await raises(SwarmingError, lambda: world.call(open_lane=never_open))
        assert wanted in str(error)
        assert isinstance(error, ProtocolViolation | ConnectionLost)


async def test_a_side_that_never_closes_is_cut_off_after_the_other_has(autojump_clock: MockClock) -> None:
    async def stay(stream: Stream) -> None:
        await read_stop_request(stream)
        await stream.write(encode_stop(RelayAnswer(RelayStatus.OK)))
        await hold(stream)

    async with scene(stay) as world:
        pipe = await world.call()
        await end_one_side(pipe)
        started_s = trio.current_time()
        await raises(ConnectionLost, lambda: pipe.receive_some(1))
        assert trio.current_time() - started_s == pytest.approx(LINGER_S, abs=0.1)
        await world.assert_nothing_is_left()


async def test_nobody_is_connected_without_a_reservation(autojump_clock: MockClock) -> None:
    async with scene() as world:
        error = await raises(RelayRefused, lambda: world.call(world.client.peer_id))
        assert "the peer holds no reservation there" in str(error)
        error = await raises(RelayRefused, lambda: world.call(world.relay_node.peer_id))
        await world.server.disconnect(world.relay_node.peer_id)
        await raises(RelayRefused, world.call)
        assert world.relay.statistics().num_reservations == 0
        await world.assert_nothing_is_left()


@over_both
async def test_one_circuit_too_many_is_refused_with_the_reason(over: str, autojump_clock: MockClock) -> None:
    async with scene(limits=RelayLimits(max_circuits_per_target=2), over=over) as world:
        pipes = [await world.call(), await world.call()]
        error = await raises(RelayRefused, world.call)
        assert str(error) == f"relay {world.relay_node.peer_id} refused: it has no room for another circuit"
        await pipes[0].aclose()
        await trio.sleep(0.1)
        await world.call()


async def test_a_relay_without_room_refuses_reservations_with_the_reason(autojump_clock: MockClock) -> None:
    async with scene(limits=RelayLimits(max_reservations=1)) as world:
        error = await raises(RelayRefused, lambda: reserve(world.client, world.relay_node.peer_id))
        assert str(error) == f"relay {world.relay_node.peer_id} refused: it has no room for another reservation"


async def test_a_target_that_refuses_or_stays_silent_costs_the_caller_a_reason(autojump_clock: MockClock) -> None:
    async def refuse(stream: Stream) -> None:
        await read_stop_request(stream)
        await stream.write(encode_stop(RelayAnswer(RelayStatus.PERMISSION_DENIED)))

    for handler, wait_s in ((refuse, 0.0), (hold, CONNECT_TIMEOUT_S)):
        async with scene(handler) as world:
            started_s = trio.current_time()
            error = await raises(RelayRefused, world.call)
            assert "could not get through to the peer" in str(error)
            assert trio.current_time() - started_s == pytest.approx(wait_s, abs=0.2)
            await world.assert_nothing_is_left()


@over_both
@pytest.mark.parametrize("limits", [RelayLimits(circuit_bytes=100_000), RelayLimits(circuit_s=5.0)])
async def test_a_circuit_is_cut_at_its_limit(limits: RelayLimits, over: str, autojump_clock: MockClock) -> None:
    async with scene(limits=limits, over=over) as world:
        pipe = await world.call()
        num_echoed = 0

        async def exchange_forever() -> None:
            nonlocal num_echoed
            while True:
                await pipe.send_all(bytes(1000))
                received = await pipe.receive_some(1 << 20)
                num_echoed += len(received)
                if not received:
                    raise ConnectionLost("ended")
                await trio.sleep(0.001)  # sockets have no delay of their own

        await raises(ConnectionLost, exchange_forever)
        assert num_echoed <= 50_000 if limits.circuit_bytes == 100_000 else trio.current_time() < 7.0
        await world.assert_nothing_is_left()


@over_both
async def test_the_rate_of_a_relay_is_shared_by_its_circuits(over: str, autojump_clock: MockClock) -> None:
    async with scene(limits=RelayLimits(rate_bytes_per_s=1_000_000.0), over=over) as world:
        pipes = [await world.call(), await world.call()]
        started_s = trio.current_time()

        async def exchange(pipe: Pipe) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pipe.send_all, bytes(1_000_000))
                num_received = 0
                while num_received < 1_000_000:
                    num_received += len(await pipe.receive_some(1 << 20))

        async with trio.open_nursery() as nursery:
            for pipe in pipes:
                nursery.start_soon(exchange, pipe)
        assert 3.5 < trio.current_time() - started_s < 4.5


async def test_a_reservation_is_renewed_before_it_ends(autojump_clock: MockClock) -> None:
    async with scene(limits=RelayLimits(reservation_s=RENEWAL_INTERVAL_S * 1.5)) as world:
        await trio.sleep(RENEWAL_INTERVAL_S * 5)
        await world.call()


async def test_a_reservation_that_is_not_renewed_ends(autojump_clock: MockClock) -> None:
    async with scene(limits=RelayLimits(reservation_s=RENEWAL_INTERVAL_S * 0.5)) as world:
        await trio.sleep(RENEWAL_INTERVAL_S * 0.6)
        await raises(RelayRefused, world.call)


async def test_a_holder_that_ends_its_stream_in_good_order_keeps_the_place(autojump_clock: MockClock) -> None:
    """So libp2p's own nodes do; a reservation then lives as long as its connection, and its time."""
    async with scene() as world, world.memory.node(4) as other:
        other.serve(STOP_PROTOCOL, take_up)
        await other.connect(world.relay_node.addresses[0])
        stream = await other.open_stream(world.relay_node.peer_id, HOP_PROTOCOL)
        await stream.write(encode_hop(ReserveRequest()))
        assert (await read_hop_answer(stream)).status == RelayStatus.OK
        await stream.close_write()
        await read_all(stream)
        await world.call(other.peer_id)


async def test_the_end_of_a_relay_is_noticed_at_once_and_told_with_a_reason(autojump_clock: MockClock) -> None:
    async with scene() as world, world.memory.node(4) as holder:
        holder.add_addresses(world.relay_node.peer_id, world.relay_node.addresses)
        reservation = await reserve(holder, world.relay_node.peer_id)
        with trio.fail_after(1):
            world.memory.kill(world.relay_node.peer_id)
            assert world.relay_node.peer_id in await reservation.hold()


async def test_a_reservation_that_is_released_leaves_its_place_to_others(autojump_clock: MockClock) -> None:
    async with scene(limits=RelayLimits(max_reservations=2)) as world, world.memory.node(4) as holder:
        holder.add_addresses(world.relay_node.peer_id, world.relay_node.addresses)
        reservation = await reserve(holder, world.relay_node.peer_id)
        await raises(RelayRefused, lambda: reserve(world.client, world.relay_node.peer_id))
        reservation.release()
        await trio.sleep(0.1)
        await reserve(world.client, world.relay_node.peer_id)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xff\xff", frame(b"\xff\xff"), encode_hop(RelayAnswer(RelayStatus.OK)), b"\x05ab"]
)
async def test_strangers_who_talk_nonsense_get_nothing_and_cost_nothing(data: bytes, autojump_clock: MockClock) -> None:
    async with scene() as world:
        stream = await world.client.open_stream(world.relay_node.peer_id, HOP_PROTOCOL)
        await stream.write(data)
        with trio.fail_after(REQUEST_TIMEOUT_S + 1):
            try:
                while await stream.read():
                    pass
            except ConnectionLost:
                pass
        assert (await world.call()).path.relay is not None
        assert world.relay.statistics().num_circuits == 1


async def test_a_request_to_connect_on_the_stream_of_a_reservation_ends_it(autojump_clock: MockClock) -> None:
    async with scene() as world:
        stream = await world.client.open_stream(world.relay_node.peer_id, HOP_PROTOCOL)
        await stream.write(encode_hop(ReserveRequest()))
        await read_hop_answer(stream)
        await stream.write(encode_hop(ConnectRequest(world.server.peer_id)))
        assert (await read_hop_answer(stream)).status == RelayStatus.UNEXPECTED_MESSAGE
        await raises(ConnectionLost, stream.read)
        error = await raises(RelayRefused, lambda: world.call(world.client.peer_id))
        assert "no reservation" in str(error)


LAN, PUBLIC, LOCAL = (TcpAddress("ip4", host, 4001) for host in ("192.168.1.7", "8.8.8.8", "127.0.0.1"))
RELAY = PeerId("12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN")


@pytest.mark.parametrize(
    ("told", "seen_at", "wanted"),
    [
        ([LAN, PUBLIC, LOCAL], PUBLIC, [PUBLIC]),
        ([LAN, LOCAL], LAN, [LAN]),
        ([LAN, LOCAL], PUBLIC, [PUBLIC]),
        ([LAN], TcpAddress("ip4", "8.8.8.8", 5555), [LAN]),
        ([], PUBLIC, [PUBLIC]),
        ([LOCAL], LOCAL, [LOCAL]),
        ([LOCAL], None, []),
    ],
)
def test_circuits_lead_over_the_addresses_of_the_relay_that_others_can_dial(
    told: list[TcpAddress], seen_at: TcpAddress | None, wanted: list[TcpAddress]
) -> None:
    texts = tuple(f"{address}/p2p/{RELAY}" for address in told)
    assert circuit_addresses(RELAY, texts, seen_at) == tuple(f"{address}/p2p/{RELAY}/p2p-circuit" for address in wanted)


def test_addresses_of_a_relay_that_are_not_understood_are_left_out() -> None:
    told = ("/ip4/8.8.8.8/udp/1/quic-v1", "/dns4/relay.example.org/tcp/443", "/ip4/8.8.8.8/tcp/1/p2p-circuit")
    assert circuit_addresses(RELAY, told, None) == (f"/dns4/relay.example.org/tcp/443/p2p/{RELAY}/p2p-circuit",)
