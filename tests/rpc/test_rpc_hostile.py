"""Peers that send nonsense, nothing, or too much: each hears why, and a session beside them notices nothing."""

import gc
import random
import struct
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import ConnectionLost, ServerBusy
from p2pswarm.core.ids import SessionId
from p2pswarm.net.network import Stream
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.testing.memory_network import Link
from p2pswarm.testing.rpc_world import TIMEOUT_S, World, open_request, open_world, step
from p2pswarm.testing.running_sum_service import SUM_MODEL, SUM_SPAN, wire_rows
from p2pswarm.wire.framed_stream import SLOWEST_BYTES_PER_S, FramedStream
from p2pswarm.wire.frames import encode_frame
from p2pswarm.wire.messages import (
    ErrorCode,
    ErrorReply,
    Forward,
    InfoReply,
    InfoRequest,
    Message,
    SessionOpened,
    Step,
    StepReply,
    WireTensor,
)
from p2pswarm.wire.serialization import encode_message

A_STEP = b"".join(encode_message(Step(0, 0, wire_rows([[1, 2, 3]]))))
FORWARD = Forward(SUM_MODEL, SUM_SPAN, wire_rows([[1, 2, 3]]))


@asynccontextmanager
async def open_world_with_neighbour(limits: RpcLimits) -> AsyncIterator[World]:
    """A world in which the other client's session takes exact steps all the while."""
    async with (
        open_world(limits=limits) as world,
        world.open_session("neighbour", max_length=1000, other=True) as session,
    ):
        done = trio.Event()

        async def step_on() -> None:
            index = 0
            while not done.is_set() or index < 10:
                assert await step(session, index, index, [1]) == [index + 1]
                index += 1
                await trio.sleep(0.5)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(step_on)
            yield world
            done.set()


async def last_words(stream: Stream) -> list[Message]:
    """All that the server still says, until it closes its side."""
    framed = FramedStream(stream)
    heard = []
    with trio.fail_after(TIMEOUT_S):
        while (message := await framed.receive()) is not None:
            heard.append(message)
    return heard


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (struct.pack("!II", (64 << 20) + 1, 10), "a frame of 67108865 bytes, at most 67108864 are taken"),
        (struct.pack("!II", 0xFFFFFFFF, 10), "a frame of 4294967295 bytes"),
        (struct.pack("!II", 1 << 20, 1 << 19), "a header of 524288 bytes, at most 65536 are taken"),
        (struct.pack("!II", 5, 5) + b"\xc0", "cannot hold its header of 5"),
        (struct.pack("!II", 5, 1) + b"\xc1", "a header that is not msgpack"),
        (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "a frame of 1195725856 bytes"),
        (random.Random(3).randbytes(100_000), "a frame of"),
        (A_STEP[:20], "ended its side in the middle of a frame"),
        (A_STEP[:-1], "ended its side in the middle of a frame, after 11 bytes of it"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{len(value)}bytes",
)
@pytest.mark.parametrize("in_session", [False, True])
async def test_bytes_that_are_no_frames_are_answered_and_end_that_stream_only(
    sent: bytes, complaint: str, in_session: bool, autojump_clock: MockClock
) -> None:
    async with open_world_with_neighbour(RpcLimits()) as world:
        stream = await world.open_raw()
        if in_session:
            await stream.write(*encode_message(open_request()))
        await stream.write(sent)
        await stream.close_write()
        *before, error = await last_words(stream)
        assert before == ([SessionOpened(SessionId("session"))] if in_session else [])
        assert isinstance(error, ErrorReply)
        assert error.code is ErrorCode.BAD_REQUEST
        assert complaint in error.message
        assert str(world.network.peer_id) in error.message
        await trio.sleep(5)
        assert world.server.statistics().num_streams == 1


def header(**fields: object) -> bytes:
    return b"".join(encode_frame({"type": "step", "version": 1, "step_id": 9, "position": 0, **fields}))


@pytest.mark.parametrize(
    ("sent", "code", "complaint"),
    [
        (header(type="unheard_of"), ErrorCode.UNKNOWN_MESSAGE, "a message of unknown type 'unheard_of'"),
        (header(type=None), ErrorCode.UNKNOWN_MESSAGE, "a message of unknown type None"),
        (header(version=0), ErrorCode.UNSUPPORTED_VERSION, "this node from 1 to 4"),
        (header(), ErrorCode.BAD_REQUEST, "wanted a tensor hidden_states, got none"),
        (header(position=-4), ErrorCode.BAD_REQUEST, "position to be a whole number"),
        (header(tensors=[["x", "float32", [1 << 40], "none", 1]]), ErrorCode.BAD_REQUEST, "of at most 4 dimensions"),
        (header(tensors=[["x", "float32", [1], "none", 4]]), ErrorCode.BAD_REQUEST, "a body of the 4 bytes"),
    ],
)
async def test_messages_that_make_no_sense_are_answered_and_the_session_goes_on(
    sent: bytes, code: ErrorCode, complaint: str, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        stream = await world.open_raw()
        framed = FramedStream(stream)
        await framed.send(open_request())
        assert await world.hear(framed) == SessionOpened(SessionId("session"))
        await framed.send(Step(0, 0, wire_rows([[1, 2]])))
        assert await world.hear(framed) == StepReply(0, 2, wire_rows([[1, 3]]))
        await stream.write(sent)
        answer = await world.hear(framed)
        assert isinstance(answer, ErrorReply)
        assert answer.code is code
        assert complaint in answer.message
        await framed.send(Step(10, 2, wire_rows([[3]])))
        assert await world.hear(framed) == StepReply(10, 3, wire_rows([[6]]))


async def test_a_single_call_survives_a_message_of_unknown_type(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        stream = await world.open_raw()
        framed = FramedStream(stream)
        await stream.write(header(type="unheard_of"))
        answer = await world.hear(framed)
        assert isinstance(answer, ErrorReply)
        assert answer.code is ErrorCode.UNKNOWN_MESSAGE
        await framed.send(InfoRequest())
        assert isinstance(await world.hear(framed), InfoReply)


async def test_a_hundred_half_open_streams_are_bounded_and_dropped(autojump_clock: MockClock) -> None:
    async with open_world_with_neighbour(RpcLimits()) as world:
        streams = [await world.open_raw() for _ in range(100)]
        for index, stream in enumerate(streams[:64]):
            await stream.write(A_STEP[: index % 10])
        refused = await last_words(streams[-1])
        assert refused == [ErrorReply(ErrorCode.BUSY, "no room for more than 64 streams of one peer")]
        assert world.server.statistics().num_streams == 65
        assert world.server.statistics().num_streams_refused == 36
        with pytest.raises(ServerBusy, match="no room for more than 64 streams of one peer"):
            await world.client.forward(world.peer_id, FORWARD, TIMEOUT_S)
        await trio.sleep(15)
        assert world.server.statistics().num_streams == 1
        await world.client.forward(world.peer_id, FORWARD, TIMEOUT_S)
        with pytest.raises(ConnectionLost):
            await streams[0].read()


async def test_a_hundred_silent_sessions_are_bounded_and_dropped(autojump_clock: MockClock) -> None:
    async with open_world_with_neighbour(RpcLimits(idle_session_timeout_s=60)) as world:
        opened = []
        for index in range(40):
            framed = await world.open_framed()
            await framed.send(open_request(f"session-{index}"))
            answer = await world.hear(framed)
            if isinstance(answer, ErrorReply):
                assert answer == ErrorReply(ErrorCode.BUSY, "no room for more than 32 sessions of one peer")
            else:
                opened.append(framed)
        assert len(opened) == 32
        await trio.sleep(65)
        assert world.server.statistics().num_sessions == 1
        assert isinstance(await world.hear(opened[0]), ErrorReply)


async def test_streams_of_all_peers_together_are_bounded(autojump_clock: MockClock) -> None:
    async with open_world(limits=RpcLimits(max_streams=3)) as world:
        streams = [await world.open_raw() for _ in range(3)]
        with pytest.raises(ServerBusy, match="no room for more than 3 streams in total"):
            await world.other_client.forward(world.peer_id, FORWARD, TIMEOUT_S)
        streams[0].reset()
        await trio.sleep(1)
        await world.other_client.forward(world.peer_id, FORWARD, TIMEOUT_S)


async def test_unfinished_requests_of_one_peer_hold_so_many_bytes_and_no_more(autojump_clock: MockClock) -> None:
    limits = RpcLimits(max_received_bytes_per_peer=1 << 20)
    async with open_world_with_neighbour(limits) as world:
        one, other = await world.open_raw(), await world.open_raw()
        for stream in (one, other):
            await stream.write(struct.pack("!II", 4 + 1 + 700_000, 1) + b"\x80" + bytes(500_000))
        await trio.sleep(1)
        assert 1_000_000 <= world.server.statistics().received_bytes <= 1_000_100
        await other.write(bytes(150_000))
        assert await last_words(other) == [ErrorReply(ErrorCode.BUSY, "requests of one peer may hold 1048576 bytes")]
        one.reset()
        await trio.sleep(1)
        assert world.server.statistics().received_bytes < 100


async def test_what_was_promised_and_not_sent_takes_no_memory(autojump_clock: MockClock) -> None:
    async with open_world(limits=RpcLimits(first_message_timeout_s=60)) as world:
        streams = [await world.open_raw() for _ in range(60)]
        tracemalloc.start()
        for stream in streams:
            await stream.write(struct.pack("!II", 64 << 20, 1) + b"\x80" + bytes(1000))
        await trio.sleep(1)
        current_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert world.server.statistics().num_streams == 60
        assert current_bytes < 2_000_000


async def test_a_long_request_is_not_kept_once_it_is_answered(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session(max_length=1000, batch_size=1000) as session:
        tracemalloc.start()
        rows = WireTensor("float32", (1000, 1000, 1), bytes(4_000_000))
        with pytest.raises(Exception, match="beyond the 0 tokens"):
            await session.step(Step(0, 1, rows), TIMEOUT_S)
        del rows
        gc.collect()
        await trio.sleep(1)
        current_bytes, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes > 8_000_000
        assert current_bytes < 1_000_000


async def test_a_reader_that_never_reads_blocks_nobody_and_is_dropped(autojump_clock: MockClock) -> None:
    async with open_world_with_neighbour(RpcLimits()) as world:
        stream = await world.open_raw()
        big = Forward(SUM_MODEL, SUM_SPAN, WireTensor("float32", (1, 500_000, 1), bytes(2_000_000)))
        await stream.write(*encode_message(big))
        await trio.sleep(10)
        assert world.server.statistics().num_busy >= 1
        await trio.sleep(30 + 2_000_000 / SLOWEST_BYTES_PER_S)
        assert world.server.statistics().num_streams == 1
        assert world.server.statistics().received_bytes == 0


async def test_a_long_request_over_a_slow_path_gets_its_time(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.memory.set_link(world.peer_id, world.network.peer_id, Link(0.1, bandwidth_bytes_per_s=20_000))
        tokens = WireTensor("float32", (1, 500_000, 1), bytes(2_000_000))
        reply = await world.client.forward(world.peer_id, Forward(SUM_MODEL, SUM_SPAN, tokens), 300.0)
        assert reply.hidden_states == tokens
        assert trio.current_time() > 200


async def test_a_request_that_trickles_in_has_a_deadline(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        stream = await world.open_raw()
        with pytest.raises(ConnectionLost), trio.fail_after(60):  # noqa: PT012 - whichever write comes too late
            for byte in A_STEP:
                await stream.write(bytes([byte]))
                await trio.sleep(1)
        await world.until_quiet()
