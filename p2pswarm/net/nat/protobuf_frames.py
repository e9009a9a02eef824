"""The framing of libp2p's small protocols: each message after its length as a varint. It knows no message."""

from p2pswarm.core.errors import ConnectionLost, ProtocolViolation
from p2pswarm.net.network import Stream

MAX_MESSAGE_BYTES = 4096
"""As in go-libp2p; ours have some hundred bytes, most of them addresses."""
LENGTH_BITS = 7
MAX_LENGTH_BYTES = 2
"""14 bits, more than `MAX_MESSAGE_BYTES` needs."""


def frame(message: bytes) -> bytes:
    length = len(message)
    assert length <= MAX_MESSAGE_BYTES, "what we send is bounded well below"
    low, high = length & 127, length >> LENGTH_BITS
    return bytes([low | 128, high] if high else [low]) + message


async def read_frame(stream: Stream) -> bytes | None:
    """One message and not a byte more, so that what follows is for others to read; None at the end of the stream.

    Raises `ProtocolViolation`, and `ConnectionLost` when the stream ends in the middle.
    """
    length = 0
    for index in range(MAX_LENGTH_BYTES):
        byte = await stream.read(1)
        if not byte and index == 0:
            return None
        if not byte:
            raise _ended_in_the_middle(stream)
        length |= (byte[0] & 127) << LENGTH_BITS * index
        if byte[0] < 128:
            break
    else:
        length = MAX_MESSAGE_BYTES + 1
    if length > MAX_MESSAGE_BYTES:
        raise ProtocolViolation(
            f"{stream.peer_id} announced a message of more than {MAX_MESSAGE_BYTES} bytes on {stream.protocol}",
            stream.peer_id,
        )
    return await _read_exactly(stream, length)


async def read_due_frame(stream: Stream) -> bytes:
    """One message; `ConnectionLost` also at the end of the stream."""
    message = await read_frame(stream)
    if message is None:
        raise ConnectionLost(f"{stream.peer_id} ended the stream instead of saying something", stream.peer_id)
    return message


async def _read_exactly(stream: Stream, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        more = await stream.read(num_bytes - len(data))
        if not more:
            raise _ended_in_the_middle(stream)
        data += more
    return data


def _ended_in_the_middle(stream: Stream) -> ConnectionLost:
    return ConnectionLost(f"{stream.peer_id} ended the stream in the middle of a message", stream.peer_id)
