"""A connection that moves from one transport to another under its streams: no byte lost, doubled or overtaken."""

import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import PeerId
from p2pswarm.net.config import KIB, MIB, NetworkConfig
from p2pswarm.net.mux_connection import MuxConnection
from p2pswarm.net.mux_frames import FrameParser, FrameType, GoAwayCode, encode_header
from p2pswarm.net.mux_stream import MuxStream
from p2pswarm.net.mux_transports import SecureTransport
from p2pswarm.net.path import DIRECT, ConnectionPath

RELAYED = ConnectionPath(relay=PeerId("relay"))
DIRECT_AT_LAST = replace(DIRECT, left_relay=RELAYED.relay)
NewPipe = Callable[[], tuple[SecureTransport, SecureTransport]]
OFTEN_PINGING = NetworkConfig(ping_interval_s=0.05, ping_timeout_s=5)


@dataclass
class Direction:
    """Bytes on their way; each chunk arrives some time after the one before it, a full one makes its sender wait."""

    randomness: random.Random
    max_delay_s: float
    chunks: deque[tuple[float, bytes]] = field(default_factory=deque)
    size_bytes: int = 0
    is_closed: bool = False
    changed: trio.Event = field(default_factory=trio.Event)

    def put(self, data: bytes) -> None:
        earliest_s = self.chunks[-1][0] if self.chunks else trio.current_time()
        self.chunks.append((earliest_s + self.randomness.uniform(0, self.max_delay_s), data))
        self.size_bytes += len(data)
        self.wake()

    async def get(self) -> bytes:
        while not self.chunks:
            if self.is_closed:
                return b""
            await self.changed.wait()
        await trio.sleep_until(self.chunks[0][0])
        _, data = self.chunks.popleft() if self.chunks else (0.0, b"")
        self.size_bytes -= len(data)
        self.wake()
        return data

    def wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class SlowTransport:
    """One end of two directions; what `write_now` takes at once is a matter of chance."""

    def __init__(self, outward: Direction, inward: Direction) -> None:
        self.outward = outward
        self.inward = inward
        self.is_closed = False
        self.is_broken = False
        self._left = b""

    async def read_some(self) -> bytes:
        await trio.lowlevel.checkpoint()
        self._raise_if_over()
        data = await self.inward.get()
        self._raise_if_over()
        return data

    async def write_all(self, buffers: Sequence[bytes | memoryview]) -> None:
        data, self._left = self._left + b"".join(buffers), b""
        await trio.lowlevel.checkpoint()
        while self.outward.size_bytes > 64 * KIB and not self.outward.is_closed:
            await self.outward.changed.wait()
        self._raise_if_over()
        self.outward.put(data)

    def write_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
        self._raise_if_over()
        data = b"".join(buffers)
        num_sent = self.outward.randomness.choice((0, len(data) // 2, len(data)))
        if num_sent:
            self.outward.put(data[:num_sent])
        self._left = data[num_sent:]
        return not self._left

    def _raise_if_over(self) -> None:
        if self.is_broken or self.inward.is_closed:
            raise ConnectionLost("the transport is over")

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
        self.is_closed = True
        self.break_off()

    def break_off(self) -> None:
        """What is on its way is lost: so do a reset and a relay whose other side has gone."""
        self.is_broken = True
        for direction in (self.outward, self.inward):
            direction.is_closed = True
            direction.chunks.clear()
            direction.wake()


def new_transports(randomness: random.Random, max_delay_s: float = 0.02) -> tuple[SlowTransport, SlowTransport]:
    there = Direction(randomness, randomness.uniform(0, max_delay_s))
    back = Direction(randomness, randomness.uniform(0, max_delay_s))
    return SlowTransport(there, back), SlowTransport(back, there)


class Pair:
    """Two connections that run over transports of random delay."""

    def __init__(self, randomness: random.Random, nursery: trio.Nursery) -> None:
        self.randomness = randomness
        self.transports = list(new_transports(randomness))
        one, other = self.transports
        self.dialler = MuxConnection(one, PeerId("listener"), RELAYED, is_initiator=True, config=OFTEN_PINGING)
        self.listener = MuxConnection(other, PeerId("dialler"), RELAYED, is_initiator=False, config=OFTEN_PINGING)
        nursery.start_soon(self.dialler.run)
        nursery.start_soon(self.listener.run)

    async def open(self) -> tuple[MuxStream, MuxStream]:
        opener, accepter = self.randomness.sample((self.dialler, self.listener), 2)
        ours, theirs = await opener.open_stream(), await accepter.accept_stream()
        assert theirs is not None
        return ours, theirs

    async def move(self) -> None:
        """Begins a move, as the two ends of a new connection do: the listener agrees, later the dialler leads."""
        one, other = new_transports(self.randomness)
        self.transports += one, other
        self.listener.move_to(other, DIRECT)
        await trio.sleep(self.randomness.uniform(0, 0.05))
        self.dialler.move_to(one, DIRECT)

    async def wait_moved(self) -> None:
        ends = self.dialler._transports, self.listener._transports
        while any(end.has_to_leave or end._destination is not None for end in ends):  # noqa: ASYNC110 - simulated
            await trio.sleep(0.001)


async def send(randomness: random.Random, stream: MuxStream, data: bytes) -> None:
    start = 0
    while start < len(data):
        end = start + randomness.choice((1, 100, 5 * KIB, 200 * KIB))
        await stream.write(data[start:end])
        start = end
        await trio.sleep(randomness.choice((0, 0, 0.002, 0.02)))
    await stream.close_write()


async def receive(randomness: random.Random, stream: MuxStream, data: bytes) -> None:
    received = bytearray()
    while True:
        with trio.move_on_after(randomness.choice((0, 0.001, 0.1))):
            more = await stream.read(randomness.randrange(1, 100 * KIB))
            if not more:
                break
            received += more
    assert received == data


simulated = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@simulated
@given(seed=st.integers(0, 2**32), num_moves=st.integers(1, 4), num_streams=st.integers(1, 12))
def test_every_byte_arrives_once_and_in_order_whenever_both_ends_move(
    seed: int, num_moves: int, num_streams: int
) -> None:
    randomness = random.Random(seed)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            pair = Pair(randomness, nursery)
            async with trio.open_nursery() as traffic:
                for _ in range(num_streams):
                    ours, theirs = await pair.open()
                    for writer, reader in ((ours, theirs), (theirs, ours)):
                        data = randomness.randbytes(randomness.choice((0, 10, KIB, 300 * KIB, MIB)))
                        traffic.start_soon(send, randomness, writer, data)
                        traffic.start_soon(receive, randomness, reader, data)
                for _ in range(num_moves):
                    await trio.sleep(randomness.uniform(0, 0.2))
                    await pair.move()
                    await pair.wait_moved()
            await trio.sleep(1)
            assert (pair.dialler.num_streams, pair.listener.num_streams) == (0, 0)
            assert pair.dialler.path == pair.listener.path == DIRECT_AT_LAST
            assert [transport.is_closed for transport in pair.transports] == [True] * (2 * num_moves) + [False] * 2
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


@simulated
@given(seed=st.integers(0, 2**32), dies=st.sampled_from(["old", "new"]))
def test_transport_that_dies_around_a_move_ends_both_connections_like_any_lost_one(seed: int, dies: str) -> None:
    randomness = random.Random(seed)

    async def main() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                pair = Pair(randomness, nursery)
                ours, theirs = await pair.open()
                nursery.start_soon(fails_at_last, ours)
                nursery.start_soon(fails_at_last, theirs)
                moment_s = trio.current_time() + randomness.uniform(0, 0.1)
                await trio.sleep(randomness.uniform(0, 0.02))
                await pair.move()
                await trio.sleep_until(moment_s)
                transports = {"old": pair.transports[:2], "new": pair.transports[2:]}
                for transport in transports[dies]:
                    transport.break_off()
                if dies == "old":
                    await trio.sleep(1)
                    for connection in (pair.dialler, pair.listener):
                        # Past the move nobody needs the old one; before that, its loss is the connection's.
                        assert connection.is_closed or connection.path == DIRECT_AT_LAST
                    transports["new"][0].break_off()
                    transports["new"][1].break_off()
        assert all(transport.is_closed for transport in pair.transports)
        assert pair.dialler.is_closed
        assert pair.listener.is_closed

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def fails_at_last(stream: MuxStream) -> None:
    async def write_forever() -> None:
        while True:
            await stream.write(bytes(KIB))
            await trio.sleep(0.001)

    async def read_forever() -> None:
        while True:
            assert await stream.read()

    async def fails(function: Callable[[], Awaitable[None]]) -> None:
        with pytest.raises(ConnectionLost):
            await function()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails, write_forever)
        nursery.start_soon(fails, read_forever)


async def test_move_tells_the_new_path_and_measures_the_new_round_trip(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        pair = Pair(random.Random(1), nursery)
        await trio.sleep(1)
        assert pair.dialler.path == RELAYED
        pair.dialler.round_trip_s = None
        await pair.move()
        assert pair.dialler.path == RELAYED
        await pair.wait_moved()
        assert pair.dialler.path == DIRECT_AT_LAST
        await trio.sleep(0.045)
        assert pair.dialler.round_trip_s is not None
        nursery.cancel_scope.cancel()


async def test_listener_may_agree_anew_when_the_dialler_has_given_up(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        pair = Pair(random.Random(2), nursery)
        await trio.sleep(0.1)
        given_up = new_transports(random.Random(3))[1]
        pair.listener.move_to(given_up, DIRECT)
        await given_up.close()
        await pair.move()
        await pair.wait_moved()
        ours, theirs = await pair.open()
        await ours.write(b"over the second")
        assert await theirs.read() == b"over the second"
        assert given_up.is_closed
        nursery.cancel_scope.cancel()


async def test_move_begun_in_the_middle_of_another_is_refused_and_harms_nothing(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        pair = Pair(random.Random(4), nursery)
        await trio.sleep(0.1)
        await pair.move()
        refused = new_transports(random.Random(5))[0]
        with pytest.raises(ConnectionLost, match="on the move already"):
            pair.dialler.move_to(refused, DIRECT)
        assert not refused.is_closed
        await pair.wait_moved()
        assert pair.dialler.path == DIRECT_AT_LAST
        nursery.cancel_scope.cancel()


async def test_connection_that_has_ended_does_not_move(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        pair = Pair(random.Random(6), nursery)
        await pair.dialler.close()
        with pytest.raises(ConnectionLost, match="closed here"):
            pair.dialler.move_to(new_transports(random.Random(7))[0], DIRECT)


async def test_second_move_that_was_not_agreed_is_a_violation(new_pipe: NewPipe, autojump_clock: MockClock) -> None:
    near, far = new_pipe()
    new_near, new_far = new_pipe()
    move = encode_header(FrameType.MOVE, 0, 0, 0)
    async with trio.open_nursery() as nursery:
        connection = MuxConnection(near, PeerId("attacker"), RELAYED, is_initiator=False)
        nursery.start_soon(connection.run)
        connection.move_to(new_near, DIRECT)
        await far.write_all([move])
        await new_far.write_all([move])
        parser = FrameParser()
        frames = []
        while data := await new_far.read_some():
            frames += parser.feed(data)
        assert (frames[-1].type, frames[-1].length) == (FrameType.GO_AWAY, GoAwayCode.PROTOCOL_ERROR)
        assert connection.is_closed


async def test_peer_that_falls_silent_after_a_move_is_dropped(autojump_clock: MockClock) -> None:
    near, far = new_transports(random.Random(8))
    async with trio.open_nursery() as nursery:
        connection = MuxConnection(near, PeerId("silent"), RELAYED, is_initiator=False)
        nursery.start_soon(connection.run)
        stream = await connection.open_stream()
        connection.move_to(new_transports(random.Random(9))[0], DIRECT)
        await far.write_all([encode_header(FrameType.MOVE, 0, 0, 0)])
        started_s = trio.current_time()
        with pytest.raises(ConnectionLost, match="no sign of life"):
            await stream.read()
        assert trio.current_time() - started_s <= 25.1
