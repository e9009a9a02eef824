"""Messages over a stream: cancellation loses nothing, versions meet, endings and budgets are kept."""

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import MalformedMessage, ProtocolViolation, ServerBusy
from p2pswarm.core.ids import PeerId
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.frames import Buffer, encode_frame
from p2pswarm.wire.messages import ErrorCode, ErrorReply, ForwardReply, InfoRequest, WireTensor
from p2pswarm.wire.serialization import encode_message

PEER = PeerId("12D3KooWpeer")
REPLY = ForwardReply(WireTensor("float32", (1, 100, 1), bytes(400)))


class OneWayStream:
    """Reads what a test puts in, piece by piece; keeps what is written."""

    peer_id = PEER

    def __init__(self) -> None:
        self.put, self._incoming = trio.open_memory_channel[bytes](100)
        self.written = b""

    async def read(self, max_bytes: int = 1 << 20) -> bytes:
        try:
            return await self._incoming.receive()
        except trio.EndOfChannel:
            return b""

    async def write(self, *buffers: Buffer) -> None:
        await trio.lowlevel.checkpoint()
        self.written += b"".join(buffers)

    async def close_write(self) -> None:
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        self.put.close()


class Budget:
    """At most 300 bytes."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def change(self, num_bytes: int) -> None:
        if self.num_bytes + num_bytes > 300:
            raise ServerBusy("too much")
        self.num_bytes += num_bytes


def whole(*messages: InfoRequest | ForwardReply) -> bytes:
    return b"".join(b"".join(encode_message(message)) for message in messages)


async def test_a_cancelled_receive_has_lost_nothing(autojump_clock: MockClock) -> None:
    stream = OneWayStream()
    framed = FramedStream(stream)
    data = whole(REPLY)
    for start in range(0, len(data), 50):
        with trio.move_on_after(1) as scope:
            await framed.receive()
        assert scope.cancelled_caught
        stream.put.send_nowait(data[start : start + 50])
    assert await framed.receive() == REPLY


async def test_messages_that_come_together_are_received_one_by_one() -> None:
    stream = OneWayStream()
    framed = FramedStream(stream)
    stream.put.send_nowait(whole(REPLY, InfoRequest(), REPLY))
    stream.put.close()
    assert [await framed.receive() for _ in range(4)] == [REPLY, InfoRequest(), REPLY, None]


async def test_an_end_in_the_middle_is_told_apart_from_an_end() -> None:
    stream = OneWayStream()
    stream.put.send_nowait(whole(REPLY)[:-1])
    stream.put.close()
    with pytest.raises(ProtocolViolation, match="ended its side in the middle of a frame, after 399 bytes"):
        await FramedStream(stream).receive()


async def test_a_message_that_makes_no_sense_does_not_stop_the_next() -> None:
    stream = OneWayStream()
    framed = FramedStream(stream)
    stream.put.send_nowait(b"".join(encode_frame({"type": "error"})) + whole(REPLY))
    with pytest.raises(MalformedMessage, match="error from 12D3KooWpeer: wanted code to be text"):
        await framed.receive()
    assert await framed.receive() == REPLY


@pytest.mark.parametrize(("theirs", "both"), [({}, 1), ({"version": 1}, 1), ({"version": 7}, 4)])
async def test_both_speak_the_smaller_version(theirs: dict[str, int], both: int) -> None:
    stream = OneWayStream()
    framed = FramedStream(stream)
    stream.put.send_nowait(b"".join(encode_frame({"type": "info_request", **theirs})))
    assert await framed.receive() == InfoRequest()
    assert framed.version == both


async def test_what_has_come_is_charged_until_the_next_receive(autojump_clock: MockClock) -> None:
    stream, budget = OneWayStream(), Budget()
    framed = FramedStream(stream, budget=budget)
    small = ForwardReply(WireTensor("float32", (1, 50, 1), bytes(200)))
    stream.put.send_nowait(whole(small))
    assert await framed.receive() == small
    assert budget.num_bytes == 200
    with trio.move_on_after(1):
        await framed.receive()
    assert budget.num_bytes == 0
    stream.put.send_nowait(whole(REPLY)[:-1])
    with pytest.raises(ServerBusy, match="too much"):
        await framed.receive()
    framed.reset()
    assert budget.num_bytes == 0


async def test_what_is_sent_is_the_messages_frame() -> None:
    stream = OneWayStream()
    await FramedStream(stream).send(ErrorReply(ErrorCode.BUSY, "no"))
    assert stream.written == b"".join(encode_message(ErrorReply(ErrorCode.BUSY, "no")))
