"""Kept streams: the latest is used first, few are kept per peer, none for long."""

import trio
from trio.testing import MockClock

from p2pswarm.core.ids import PeerId
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.rpc.stream_pool import StreamPool
from p2pswarm.wire.framed_stream import FramedStream

LIMITS = RpcLimits(max_idle_streams_per_peer=2, max_idle_streams=3, keep_idle_stream_s=60)


class QuietStream:
    """Does nothing but to know whether it was reset."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = PeerId(peer_id)
        self.is_reset = False

    async def read(self, max_bytes: int = 1) -> bytes:
        return b""

    async def write(self, *buffers: bytes | bytearray | memoryview) -> None:
        pass

    async def close_write(self) -> None:
        pass

    def reset(self) -> None:
        self.is_reset = True


def put(pool: StreamPool, peer_id: str) -> tuple[QuietStream, FramedStream]:
    stream = QuietStream(peer_id)
    framed = FramedStream(stream)
    pool.put(framed)
    return stream, framed


async def test_the_latest_stream_of_the_peer_is_taken_first(autojump_clock: MockClock) -> None:
    pool = StreamPool(LIMITS)
    (_, first), (_, second), (_, other) = put(pool, "a"), put(pool, "a"), put(pool, "b")
    assert [pool.take(PeerId("a")) for _ in range(3)] == [second, first, None]
    assert pool.take(PeerId("b")) is other


async def test_more_than_a_few_of_one_peer_are_not_kept(autojump_clock: MockClock) -> None:
    pool = StreamPool(LIMITS)
    streams = [put(pool, "a")[0] for _ in range(3)]
    assert [stream.is_reset for stream in streams] == [False, False, True]


async def test_the_oldest_gives_way_when_there_are_too_many_in_all(autojump_clock: MockClock) -> None:
    pool = StreamPool(LIMITS)
    streams = [put(pool, peer_id)[0] for peer_id in "abcd"]
    assert [stream.is_reset for stream in streams] == [True, False, False, False]
    assert len(pool) == 3


async def test_none_is_kept_for_long(autojump_clock: MockClock) -> None:
    pool = StreamPool(LIMITS)
    old, _ = put(pool, "a")
    await trio.sleep(61)
    young, framed = put(pool, "a")
    assert (old.is_reset, young.is_reset) == (True, False)
    assert pool.take(PeerId("a")) is framed


async def test_closing_the_pool_closes_them_all(autojump_clock: MockClock) -> None:
    pool = StreamPool(LIMITS)
    streams = [put(pool, peer_id)[0] for peer_id in "ab"]
    pool.close()
    assert all(stream.is_reset for stream in streams)
    assert len(pool) == 0
