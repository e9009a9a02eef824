"""The muxer against a peer that breaks the rules, floods or sends noise: its connection ends, and no more."""

import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, memory_stream_pair

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import PeerId
from p2pswarm.net.config import KIB, MIB, NetworkConfig
from p2pswarm.net.mux_connection import FREE_UNREAD_BYTES, MAX_QUEUED_ANSWER_BYTES, OVERFULL_POLL_S, MuxConnection
from p2pswarm.net.mux_frames import (
    ACK,
    FIN,
    HEADER,
    INITIAL_WINDOW_BYTES,
    RST,
    SYN,
    Frame,
    FrameParser,
    FrameType,
    GoAwayCode,
    encode_header,
)
from p2pswarm.net.mux_transports import SecureTransport
from p2pswarm.net.path import DIRECT
from p2pswarm.net.unread import UnreadBytes

NewPipe = Callable[[], tuple[SecureTransport, SecureTransport]]
LIMITS = NetworkConfig(
    max_streams_per_connection=4, max_unaccepted_streams=4, max_receive_bytes_per_connection=4 * INITIAL_WINDOW_BYTES
)


class Attacker:
    """Speaks frames by hand to a connection under test."""

    def __init__(self, transport: SecureTransport, connection: MuxConnection) -> None:
        self.connection = connection
        self._transport = transport
        self._parser = FrameParser()
        self.got: list[Frame] = []

    async def send(self, type: FrameType, flags: int, stream_id: int, length: int, payload: bytes = b"") -> None:
        await self._transport.write_all([encode_header(type, flags, stream_id, length), payload])

    async def open(self, stream_id: int) -> None:
        await self.send(FrameType.WINDOW_UPDATE, SYN, stream_id, 0)

    async def collect(self) -> list[Frame]:
        """All that the connection under test has sent, once it has nothing more to say."""
        while True:
            with trio.move_on_after(0.1) as scope:
                data = await self._transport.read_some()
            if scope.cancelled_caught or not data:
                return self.got
            self.got += self._parser.feed(data)

    async def wait_dropped(self) -> None:
        """Asserts that the connection ended, with a go-away that says why."""
        got = await self.collect()
        assert got[-1] == Frame(FrameType.GO_AWAY, 0, 0, GoAwayCode.PROTOCOL_ERROR)
        assert self.connection.is_closed


Attack = Callable[..., AbstractAsyncContextManager[Attacker]]


@pytest.fixture
def attack(new_pipe: NewPipe, autojump_clock: MockClock) -> Attack:
    @asynccontextmanager
    async def open(config: NetworkConfig = LIMITS) -> AsyncIterator[Attacker]:
        theirs, ours = new_pipe()
        connection = MuxConnection(ours, PeerId("attacker"), is_initiator=False, config=config)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            yield Attacker(theirs, connection)
            nursery.cancel_scope.cancel()

    return open


async def test_data_beyond_the_window_ends_the_connection(attack: Attack) -> None:
    async with attack() as attacker:
        await attacker.open(1)
        stream = await attacker.connection.accept_stream()
        assert stream is not None
        too_much = stream.receive_window_bytes + 1
        await attacker.send(FrameType.DATA, 0, 1, too_much, bytes(too_much))
        await attacker.wait_dropped()
        with pytest.raises(ConnectionLost, match="broke the protocol"):
            await stream.read()


@pytest.mark.parametrize(
    ("type", "flags", "stream_id"),
    [
        (FrameType.DATA, 0, 1),
        (FrameType.WINDOW_UPDATE, 0, 77),
        (FrameType.WINDOW_UPDATE, RST, 2),
        (FrameType.WINDOW_UPDATE, SYN, 2),
    ],
    ids=["data", "window", "reset of ours", "opened with our parity"],
)
async def test_frames_for_streams_that_never_were_end_the_connection(
    attack: Attack, type: FrameType, flags: int, stream_id: int
) -> None:
    async with attack() as attacker:
        await attacker.send(type, flags, stream_id, 0)
        await attacker.wait_dropped()


async def test_move_that_was_not_agreed_ends_the_connection(attack: Attack) -> None:
    async with attack() as attacker:
        await attacker.send(FrameType.MOVE, 0, 0, 0)
        await attacker.wait_dropped()


async def test_bytes_after_the_last_frame_end_the_connection(attack: Attack, new_pipe: NewPipe) -> None:
    async with attack() as attacker:
        attacker.connection.move_to(new_pipe()[0], DIRECT)
        await attacker.send(FrameType.MOVE, 0, 0, 0, b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert attacker.connection.is_closed


async def test_opening_a_stream_twice_ends_the_connection(attack: Attack) -> None:
    async with attack() as attacker:
        await attacker.open(5)
        await attacker.open(5)
        await attacker.wait_dropped()


async def test_data_after_the_end_of_a_stream_ends_the_connection(attack: Attack) -> None:
    async with attack() as attacker:
        await attacker.send(FrameType.DATA, SYN | FIN, 1, 1, b"x")
        await attacker.send(FrameType.DATA, 0, 1, 1, b"y")
        await attacker.wait_dropped()


async def test_absurd_window_updates_end_the_connection(attack: Attack) -> None:
    async with attack() as attacker:
        await attacker.send(FrameType.WINDOW_UPDATE, SYN, 1, 2**32 - 1)
        await attacker.wait_dropped()


async def test_what_comes_for_a_stream_closed_here_is_dropped(attack: Attack) -> None:
    async with attack() as attacker:
        await attacker.open(1)
        stream = await attacker.connection.accept_stream()
        assert stream is not None
        stream.reset()
        for _ in range(100):
            await attacker.send(FrameType.DATA, 0, 1, 10_000, bytes(10_000))
        await attacker.send(FrameType.PING, SYN, 0, 42)
        assert Frame(FrameType.PING, ACK, 0, 42) in await attacker.collect()
        assert not attacker.connection.is_closed


async def test_streams_beyond_the_limit_are_refused_one_by_one(attack: Attack) -> None:
    async with attack() as attacker:
        for stream_id in range(1, 21, 2):
            await attacker.open(stream_id)
        got = await attacker.collect()
        refused = [frame.stream_id for frame in got if frame.flags & RST]
        assert refused == [9, 11, 13, 15, 17, 19]
        assert attacker.connection.num_streams == 4
        stream = await attacker.connection.accept_stream()
        assert stream is not None
        stream.reset()
        await attacker.open(21)
        await attacker.collect()
        assert attacker.connection.num_streams == 4


async def test_unknown_goodbye_and_early_end_are_survived(attack: Attack) -> None:
    async with attack() as attacker:
        stream = await attacker.connection.open_stream()
        await attacker.send(FrameType.GO_AWAY, 0, 0, 77)
        with pytest.raises(ConnectionLost, match="code 77"):
            await stream.read()


class Unread:
    """A transport whose peer sends without end and takes nothing."""

    def __init__(self, flood: bytes) -> None:
        self._flood = flood
        self.num_bytes_taken = 0

    async def read_some(self) -> bytes:
        await trio.lowlevel.checkpoint()
        self.num_bytes_taken += len(self._flood)
        return self._flood

    async def write_all(self, buffers: Sequence[bytes | memoryview]) -> None:
        await trio.sleep_forever()

    def write_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
        return False

    async def close(self) -> None:
        pass


def frames_that_open_and_reset(num_streams: int) -> bytes:
    return b"".join(
        encode_header(FrameType.WINDOW_UPDATE, flag, stream_id, 0)
        for stream_id in range(1, 2 * num_streams, 2)
        for flag in (SYN, RST)
    )


@pytest.mark.parametrize(
    "flood",
    [encode_header(FrameType.PING, SYN, 0, 7) * 100, frames_that_open_and_reset(50_000)],
    ids=["pings", "streams opened and reset"],
)
async def test_peer_that_floods_and_reads_nothing_is_no_longer_read_and_then_dropped(
    flood: bytes, autojump_clock: MockClock
) -> None:
    transport = Unread(flood)
    connection = MuxConnection(transport, PeerId("flooder"), is_initiator=False, config=LIMITS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await trio.sleep(1)
        assert len(connection._answers) < MAX_QUEUED_ANSWER_BYTES + len(flood)
        assert transport.num_bytes_taken < MAX_QUEUED_ANSWER_BYTES + 2 * len(flood)
        await trio.sleep(25)
        assert connection.is_closed


async def test_one_byte_frames_do_not_cost_an_object_each(attack: Attack) -> None:
    async with attack() as attacker:
        await attacker.open(1)
        stream = await attacker.connection.accept_stream()
        assert stream is not None
        for _ in range(100):
            await attacker._transport.write_all([(encode_header(FrameType.DATA, 0, 1, 1) + b"x") * 1000])
        await attacker.collect()
        assert stream.buffered_bytes == 100_000
        assert len(stream._pieces) < 10
        assert await stream.read() == b"x" * 100_000


async def feed(data: bytes, config: NetworkConfig = LIMITS) -> MuxConnection:
    """A connection that ran over exactly these bytes, with someone who accepts and reads a little."""
    near, far = memory_stream_pair()

    class Transport:
        async def read_some(self) -> bytes:
            return bytes(await near.receive_some())

        async def write_all(self, buffers: Sequence[bytes | memoryview]) -> None:
            await trio.lowlevel.checkpoint()

        def write_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
            return True

        async def close(self) -> None:
            await near.aclose()

    connection = MuxConnection(Transport(), PeerId("fuzzer"), is_initiator=False, config=config)

    async def accept() -> None:
        while (stream := await connection.accept_stream()) is not None:
            with trio.move_on_after(0):
                await stream.read(1000)

    with trio.fail_after(30):
        await connection.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            nursery.start_soon(connection.run)
            await far.send_all(data)
            await far.aclose()
    return connection


def run_over(data: bytes) -> None:
    connection = trio.run(feed, data)
    assert connection.is_closed
    assert connection.num_streams == 0
    assert connection._buffered_bytes == 0


fuzz = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
wild_frames = st.builds(
    lambda version, type, flags, stream_id, length, payload: (
        HEADER.pack(version, type, flags, stream_id, length) + payload
    ),
    st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1]),
    st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4, 5]),
    st.sampled_from([0, 0, SYN, ACK, FIN, RST, SYN | FIN, SYN | RST, 15, 64]),
    st.sampled_from([0, 1, 2, 3, 3, 4, 5, 7, 2**32 - 1]),
    st.sampled_from([0, 1, 5, 100, 256 * KIB, 17 * MIB, 2**32 - 1]),
    st.binary(max_size=200),
)
tame_frames = st.one_of(
    st.builds(
        lambda flags, stream_id, payload: encode_header(FrameType.DATA, flags, stream_id, len(payload)) + payload,
        st.sampled_from([0, 0, 0, FIN, RST]),
        st.sampled_from([1, 3, 5]),
        st.binary(max_size=2000),
    ),
    st.builds(
        lambda flags, stream_id, length: encode_header(FrameType.WINDOW_UPDATE, flags, stream_id, length),
        st.sampled_from([0, ACK, FIN, RST]),
        st.sampled_from([1, 2, 3, 5]),
        st.integers(0, MIB),
    ),
    st.builds(lambda number: encode_header(FrameType.PING, SYN, 0, number), st.integers(0, 2**32 - 1)),
)
OPENINGS = b"".join(encode_header(FrameType.WINDOW_UPDATE, SYN, stream_id, 0) for stream_id in (1, 3, 5))


@fuzz
@given(st.binary(max_size=500))
def test_arbitrary_bytes_end_the_connection_and_nothing_else(data: bytes) -> None:
    run_over(data)


@fuzz
@given(st.lists(wild_frames, max_size=20))
def test_arbitrary_frames_end_the_connection_and_nothing_else(frames: list[bytes]) -> None:
    run_over(b"".join(frames))


@fuzz
@given(st.lists(tame_frames, max_size=30), st.binary(max_size=20))
def test_plausible_frames_in_any_order_end_the_connection_and_nothing_else(frames: list[bytes], end: bytes) -> None:
    run_over(OPENINGS + b"".join(frames) + end)


def test_header_struct_has_no_padding() -> None:
    assert HEADER.size == 12 == struct.calcsize("!BBHII")


async def test_what_was_opened_and_reset_is_neither_kept_nor_taken_up(attack: Attack) -> None:
    async with attack() as attacker:
        await attacker.send(FrameType.DATA, SYN, 1, 10_000, bytes(10_000))
        await attacker.collect()
        waiting = attacker.connection._streams[1]
        await attacker.send(FrameType.WINDOW_UPDATE, RST, 1, 0)
        await attacker.open(3)
        await attacker.collect()
        assert not waiting._pieces
        stream = await attacker.connection.accept_stream()
        assert stream is not None
        assert stream.stream_id == 3


async def test_all_connections_together_hold_so_much_unread_and_no_more(
    new_pipe: NewPipe, autojump_clock: MockClock
) -> None:
    """Beyond, those are no longer read from that leave much; others go on."""
    unread = UnreadBytes(max_bytes=FREE_UNREAD_BYTES)
    async with trio.open_nursery() as nursery:
        attackers = []
        for _ in range(2):
            theirs, ours = new_pipe()
            connection = MuxConnection(ours, PeerId("attacker"), is_initiator=False, unread=unread)
            nursery.start_soon(connection.run)
            attackers.append(Attacker(theirs, connection))
            await attackers[-1].open(1)
        greedy, modest = attackers
        for _ in range(5):
            await greedy.send(FrameType.DATA, 0, 1, 64 * KIB, bytes(64 * KIB))
        await greedy.collect()
        assert unread.num_bytes == 5 * 64 * KIB
        await greedy.send(FrameType.PING, SYN, 0, 99)
        assert Frame(FrameType.PING, ACK, 0, 99) not in await greedy.collect()
        await modest.send(FrameType.DATA, 0, 1, 1000, bytes(1000))
        stream = await modest.connection.accept_stream()
        assert stream is not None
        assert len(await stream.read()) == 1000
        stream = await greedy.connection.accept_stream()
        assert stream is not None
        await stream.read()
        await trio.sleep(OVERFULL_POLL_S)
        assert Frame(FrameType.PING, ACK, 0, 99) in await greedy.collect()
        nursery.cancel_scope.cancel()
    assert unread.num_bytes == 0
