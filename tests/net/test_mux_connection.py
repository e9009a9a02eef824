"""The muxer between two well-behaved ends: windows, closing, keep-alive, and what it keeps of streams that are gone."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import PeerId
from p2pswarm.net.config import KIB, MIB, NetworkConfig
from p2pswarm.net.mux_connection import MuxConnection
from p2pswarm.net.mux_frames import INITIAL_WINDOW_BYTES
from p2pswarm.net.mux_stream import MuxStream
from p2pswarm.net.mux_transports import SecureTransport

NewPipe = Callable[[], tuple[SecureTransport, SecureTransport]]
Pair = tuple[MuxConnection, MuxConnection]
OpenPair = Callable[..., AbstractAsyncContextManager[Pair]]


@pytest.fixture
def open_pair(new_pipe: NewPipe) -> OpenPair:
    """Two connections that run, one at each end of a pipe."""

    @asynccontextmanager
    async def open(config: NetworkConfig = NetworkConfig()) -> AsyncIterator[Pair]:  # noqa: B008
        one, other = new_pipe()
        dialler = MuxConnection(one, PeerId("listener"), is_initiator=True, config=config)
        listener = MuxConnection(other, PeerId("dialler"), is_initiator=False, config=config)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialler.run)
            nursery.start_soon(listener.run)
            yield dialler, listener
            nursery.cancel_scope.cancel()

    return open


async def connect(dialler: MuxConnection, listener: MuxConnection) -> tuple[MuxStream, MuxStream]:
    ours = await dialler.open_stream()
    theirs = await listener.accept_stream()
    assert theirs is not None
    return ours, theirs


async def read_exactly(stream: MuxStream, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        more = await stream.read(num_bytes - len(data))
        assert more
        data += more
    return bytes(data)


async def expect(stream: MuxStream, data: bytes) -> None:
    assert await read_exactly(stream, len(data)) == data


async def test_streams_of_both_sides_carry_data_both_ways(open_pair: OpenPair) -> None:
    async with open_pair() as (dialler, listener):
        for opener, accepter in ((dialler, listener), (listener, dialler)):
            ours, theirs = await connect(opener, accepter)
            await ours.write(b"to and")
            assert await read_exactly(theirs, 6) == b"to and"
            await theirs.write(b" fro")
            assert await read_exactly(ours, 4) == b" fro"


async def test_writer_stops_at_the_window_and_goes_on_when_the_reader_does(open_pair: OpenPair) -> None:
    data = random.Random(1).randbytes(12 * MIB)
    async with open_pair() as (dialler, listener), trio.open_nursery() as nursery:
        ours, theirs = await connect(dialler, listener)
        nursery.start_soon(ours.write, data)
        await trio.testing.wait_all_tasks_blocked()
        assert INITIAL_WINDOW_BYTES < theirs.buffered_bytes < len(data)
        assert theirs.buffered_bytes == theirs.receive_window_bytes
        assert await read_exactly(theirs, len(data)) == data


async def test_window_of_a_fast_reader_grows_and_that_of_a_slow_one_does_not(
    open_pair: OpenPair, autojump_clock: MockClock
) -> None:
    async with open_pair() as (dialler, listener), trio.open_nursery() as nursery:
        for pause_s, grows in ((0.0, True), (1.0, False)):
            ours, theirs = await connect(dialler, listener)
            window_bytes = theirs.receive_window_bytes
            nursery.start_soon(ours.write, bytes(20 * MIB))
            for _ in range(20):
                await read_exactly(theirs, MIB)
                await trio.sleep(pause_s)
            assert (theirs.receive_window_bytes > window_bytes) == grows


async def test_windows_never_outgrow_the_budget_of_the_connection(open_pair: OpenPair) -> None:
    config = NetworkConfig(max_receive_bytes_per_connection=40 * MIB)
    async with open_pair(config) as (dialler, listener), trio.open_nursery() as nursery:
        streams = [await connect(dialler, listener) for _ in range(50)]
        for ours, _ in streams:
            nursery.start_soon(ours.write, bytes(8 * MIB))
        for _, theirs in streams[:5]:
            await read_exactly(theirs, 8 * MIB)
        growth = sum(theirs.receive_window_bytes - INITIAL_WINDOW_BYTES for _, theirs in streams)
        assert 0 < growth <= 20 * MIB
        nursery.cancel_scope.cancel()


async def test_unread_data_of_all_streams_together_is_bounded_and_nothing_is_lost(
    open_pair: OpenPair, autojump_clock: MockClock
) -> None:
    data = random.Random(3).randbytes(200 * KIB)
    async with open_pair(NetworkConfig(max_receive_bytes_per_connection=MIB)) as (dialler, listener):
        streams = [await connect(dialler, listener) for _ in range(50)]
        async with trio.open_nursery() as nursery:
            for ours, _ in streams:
                nursery.start_soon(ours.write, data)
            await trio.sleep(8)
            assert MIB < listener._buffered_bytes < MIB + 256 * KIB
            for _, theirs in streams:
                nursery.start_soon(expect, theirs, data)


async def test_growth_is_given_back_when_streams_end(open_pair: OpenPair) -> None:
    async with open_pair() as (dialler, listener):
        first_window = 0
        for _ in range(300):
            ours, theirs = await connect(dialler, listener)
            first_window = first_window or theirs.receive_window_bytes
            assert theirs.receive_window_bytes == first_window
            ours.reset()
            theirs.reset()


async def test_thousands_of_finished_streams_leave_nothing_behind(open_pair: OpenPair) -> None:
    async with open_pair() as (dialler, listener):
        for number in range(2000):
            ours, theirs = await connect(dialler, listener)
            await ours.write(b"ping")
            await ours.close_write()
            if number % 2:
                assert await theirs.read() == b"ping"
            await theirs.close()
        await trio.testing.wait_all_tasks_blocked()
        assert (dialler.num_streams, listener.num_streams) == (0, 0)
        assert listener._buffered_bytes == 0


async def test_connections_that_are_idle_for_an_hour_stay(open_pair: OpenPair, autojump_clock: MockClock) -> None:
    async with open_pair() as (dialler, listener):
        ours, theirs = await connect(dialler, listener)
        await trio.sleep(3600)
        await ours.write(b"still there?")
        assert await read_exactly(theirs, 12) == b"still there?"
        assert dialler.round_trip_s is not None
        assert listener.round_trip_s is not None


async def test_peer_that_falls_silent_is_dropped_within_25_seconds(
    new_pipe: NewPipe, autojump_clock: MockClock
) -> None:
    transport, _ = new_pipe()
    connection = MuxConnection(transport, PeerId("silent"), is_initiator=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        stream = await connection.open_stream()
        started_s = trio.current_time()
        with pytest.raises(ConnectionLost, match="no sign of life"):
            await stream.read()
        assert trio.current_time() - started_s <= 25


async def test_close_lets_queued_data_out_and_wakes_everyone(open_pair: OpenPair) -> None:
    data = random.Random(2).randbytes(100 * KIB)
    async with open_pair() as (dialler, listener), trio.open_nursery() as nursery:
        ours, theirs = await connect(dialler, listener)
        await ours.write(data)
        await dialler.close()
        with pytest.raises(ConnectionLost):
            await ours.read()
        with pytest.raises(ConnectionLost):
            await dialler.open_stream()
        assert await read_exactly(theirs, len(data)) == data
        with pytest.raises(ConnectionLost):
            await theirs.read()
        assert await listener.accept_stream() is None
        nursery.cancel_scope.cancel()


async def test_data_written_before_a_reset_can_still_be_read(open_pair: OpenPair) -> None:
    async with open_pair() as (dialler, listener):
        ours, theirs = await connect(dialler, listener)
        await ours.write(b"last words")
        ours.reset()
        assert await read_exactly(theirs, 10) == b"last words"
        with pytest.raises(ConnectionLost):
            await theirs.read()


async def test_a_short_message_is_not_held_up_by_a_hundred_long_writes(open_pair: OpenPair) -> None:
    async with open_pair() as (dialler, listener), trio.open_nursery() as nursery:
        for _ in range(100):
            ours, _theirs = await connect(dialler, listener)
            nursery.start_soon(ours.write, bytes(4 * MIB))
        await trio.testing.wait_all_tasks_blocked()
        ours, theirs = await connect(dialler, listener)
        await ours.write(b"urgent")
        assert await read_exactly(theirs, 6) == b"urgent"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", range(5))
async def test_random_traffic_under_random_cancellation_is_exact(
    open_pair: OpenPair, autojump_clock: MockClock, seed: int
) -> None:
    randomness = random.Random(seed)
    data = [randomness.randbytes(randomness.randrange(1, 2 * MIB)) for _ in range(20)]

    async def send(number: int, stream: MuxStream) -> None:
        start = 0
        while start < len(data[number]):
            end = start + randomness.randrange(1, 300 * KIB)
            await stream.write(data[number][start:end])
            start = end
            await trio.sleep(randomness.choice((0, 0.001)))
        await stream.close_write()

    async def receive(number: int, stream: MuxStream) -> None:
        received = bytearray()
        while True:
            with trio.move_on_after(randomness.choice((0, 0.0005, 0.002))):
                more = await stream.read(randomness.randrange(1, 200 * KIB))
                if not more:
                    break
                received += more
        assert received == data[number]

    async with open_pair() as (dialler, listener), trio.open_nursery() as nursery:
        for number in range(len(data)):
            ours, theirs = await connect(*((dialler, listener) if number % 2 else (listener, dialler)))
            nursery.start_soon(send, number, ours)
            nursery.start_soon(receive, number, theirs)


async def test_buffers_of_any_shape_and_type_are_written_as_their_bytes(open_pair: OpenPair) -> None:
    numbers = memoryview(bytearray(range(240)) * 1000).cast("f", shape=[100, 600])
    async with open_pair() as (dialler, listener), trio.open_nursery() as nursery:
        ours, theirs = await connect(dialler, listener)
        nursery.start_soon(ours.write, b"head", numbers, memoryview(b"").cast("f"), memoryview(bytes(8)).cast("d"))
        assert await read_exactly(theirs, 240_012) == b"head" + numbers.tobytes() + bytes(8)
        await ours.write(memoryview(bytes(12)).cast("i"), b"tail")
        assert await read_exactly(theirs, 16) == bytes(12) + b"tail"
