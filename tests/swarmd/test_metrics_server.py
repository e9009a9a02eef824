"""The page for Prometheus is served to who asks properly, and nobody else can do harm."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MemoryReceiveStream, MemorySendStream, MockClock, memory_stream_pair

from swarmd.metrics_server import MAX_CONNECTIONS, MAX_REQUEST_BYTES, TIMEOUT_S, MetricsServer

Stream = trio.StapledStream[MemorySendStream, MemoryReceiveStream]
GET = b"GET /metrics HTTP/1.1\r\nHost: localhost:9464\r\nUser-Agent: Prometheus/3.0\r\n\r\n"
PAGE = b"swarmd_sessions 4.0\n"


@asynccontextmanager
async def connection(server: MetricsServer) -> AsyncIterator[Stream]:
    """A client's end of a connection that the server answers, and closes when it is done."""
    ours, theirs = memory_stream_pair()

    async def answer() -> None:
        async with theirs:
            await server.answer(theirs)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        yield ours
        await ours.aclose()


async def read_all(stream: Stream) -> bytes:
    answer = b""
    async for data in stream:
        answer += data
    return answer


async def send_while_taken(stream: Stream, pieces: Sequence[bytes], pause_s: float) -> int:
    """How many bytes went out before the other end was closed."""
    num_sent = 0
    with suppress(trio.BrokenResourceError):
        for piece in pieces:
            await stream.send_all(piece)
            num_sent += len(piece)
            await trio.sleep(pause_s)
    return num_sent


async def ask(request: bytes) -> bytes:
    async with connection(MetricsServer(lambda: PAGE)) as stream:
        await stream.send_all(request)
        return await read_all(stream)


async def test_page_comes_with_its_type_and_length(autojump_clock) -> None:
    head, _, body = (await ask(GET)).partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK",
        b"Content-Type: text/plain; version=0.0.4; charset=utf-8",
        b"Content-Length: 20",
        b"Connection: close",
    ]
    assert body == PAGE


async def test_request_may_come_in_pieces(autojump_clock) -> None:
    async with connection(MetricsServer(lambda: PAGE)) as stream:
        for start in range(0, len(GET), 7):
            await stream.send_all(GET[start : start + 7])
            await trio.sleep(0.1)
        assert (await read_all(stream)).endswith(PAGE)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics?name=a HTTP/1.0", b"200 OK"),
        (b"HEAD /metrics HTTP/1.1", b"200 OK"),
        (b"GET / HTTP/1.1", b"404 Not Found"),
        (b"GET /metrics/../etc/passwd HTTP/1.1", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1", b"405 Method Not Allowed"),
        (b"GET /metrics", b"400 Bad Request"),
        (b"GET /metrics HTTP/2.0", b"400 Bad Request"),
        (b"\x16\x03\x01\x02\x00", b"400 Bad Request"),
    ],
)
async def test_each_request_gets_its_status(request_line: bytes, status: bytes, autojump_clock) -> None:
    answer = await ask(request_line + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert answer.endswith(PAGE) == (status == b"200 OK" and not request_line.startswith(b"HEAD"))


async def test_request_without_end_is_refused_before_it_takes_memory(autojump_clock) -> None:
    async with connection(MetricsServer(lambda: PAGE)) as stream:
        assert await send_while_taken(stream, [b"x" * 1024] * 100, pause_s=0.01) <= 2 * MAX_REQUEST_BYTES
        assert (await read_all(stream)).startswith(b"HTTP/1.1 431 ")


async def test_who_sends_a_byte_a_second_is_dropped(autojump_clock) -> None:
    began_s = trio.current_time()
    async with connection(MetricsServer(lambda: PAGE)) as stream:
        assert await send_while_taken(stream, [bytes([byte]) for byte in GET], pause_s=1.0) < len(GET)
        assert await read_all(stream) == b""
    assert trio.current_time() - began_s <= TIMEOUT_S + 1


async def test_who_never_sends_is_dropped(autojump_clock) -> None:
    began_s = trio.current_time()
    async with connection(MetricsServer(lambda: PAGE)) as stream:
        assert await read_all(stream) == b""
    assert trio.current_time() - began_s == TIMEOUT_S


async def test_who_leaves_in_the_middle_does_no_harm(autojump_clock) -> None:
    server = MetricsServer(lambda: PAGE)
    async with connection(server) as stream:
        await stream.send_all(GET[:10])
    async with connection(server) as stream:
        await stream.send_all(GET)
        assert (await read_all(stream)).endswith(PAGE)


async def test_too_many_connections_are_closed_at_once_and_the_others_time_out(autojump_clock) -> None:
    server = MetricsServer(lambda: PAGE)
    began_s = trio.current_time()
    ended_s: list[float] = []

    async def hang() -> None:
        async with connection(server) as stream:
            assert await read_all(stream) == b""
            ended_s.append(trio.current_time() - began_s)

    async with trio.open_nursery() as nursery:
        for _ in range(MAX_CONNECTIONS + 5):
            nursery.start_soon(hang)
    assert sorted(ended_s) == [0.0] * 5 + [TIMEOUT_S] * MAX_CONNECTIONS
    async with connection(server) as stream:
        await stream.send_all(GET)
        assert (await read_all(stream)).endswith(PAGE)


@given(st.lists(st.binary(max_size=3000), max_size=6), st.booleans())
@settings(deadline=None, max_examples=50)
def test_nothing_that_anybody_sends_harms_the_next_one(pieces: list[bytes], closes: bool) -> None:
    async def play() -> None:
        server = MetricsServer(lambda: PAGE)
        async with connection(server) as stream:
            try:
                for piece in pieces:
                    await stream.send_all(piece)
                if closes:
                    await stream.send_eof()
                await read_all(stream)
            except trio.BrokenResourceError:
                pass
        async with connection(server) as stream:
            await stream.send_all(GET)
            assert (await read_all(stream)).endswith(PAGE)

    trio.run(play, clock=MockClock(autojump_threshold=0))
