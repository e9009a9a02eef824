"""Agreeing on the protocol of a new stream: libp2p's multistream-select, in one round trip.

Each message is a length (one byte here: ours are short), the text, and a newline. The side that opens the stream
sends the greeting and its proposal together, so that an answer comes after one round trip; stock libp2p takes two.
"""

from collections.abc import Container
from typing import Protocol

from p2pswarm.core.errors import ConnectionLost, ProtocolViolation
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.network import Buffer

GREETING = "/multistream/1.0.0"
NOT_SPOKEN = "na"
MAX_MESSAGE_BYTES = 127
"""One byte of length; the longest protocol id of libp2p's own has half of that."""
MAX_PROPOSALS = 16


class ByteStream(Protocol):
    """The part of `net.network.Stream` that negotiation needs."""

    @property
    def peer_id(self) -> PeerId: ...

    async def read(self, max_bytes: int = ...) -> bytes: ...

    async def write(self, *buffers: Buffer) -> None: ...


async def propose(stream: ByteStream, protocol: ProtocolId) -> None:
    """Returns when the peer has agreed to speak `protocol`; raises `ProtocolViolation` when it does not."""
    await stream.write(encode_message(GREETING) + encode_message(protocol))
    greeting = await read_message(stream)
    if greeting != GREETING:
        raise ProtocolViolation(f"{stream.peer_id} greets with {greeting!r}, wanted {GREETING!r}", stream.peer_id)
    answer = await read_message(stream)
    if answer == NOT_SPOKEN:
        raise ProtocolViolation(f"{stream.peer_id} does not speak {protocol}", stream.peer_id)
    if answer != protocol:
        raise ProtocolViolation(f"{stream.peer_id} answers {answer!r} to {protocol}", stream.peer_id)


async def answer(stream: ByteStream, spoken: Container[ProtocolId]) -> ProtocolId:
    """The first of the peer's proposals that is `spoken` here; raises `ProtocolViolation` when none is."""
    await stream.write(encode_message(GREETING))
    greeting = await read_message(stream)
    if greeting != GREETING:
        raise ProtocolViolation(f"{stream.peer_id} greets with {greeting!r}, wanted {GREETING!r}", stream.peer_id)
    for _ in range(MAX_PROPOSALS):
        proposal = ProtocolId(await read_message(stream))
        if proposal in spoken:
            await stream.write(encode_message(proposal))
            return proposal
        await stream.write(encode_message(NOT_SPOKEN))
    raise ProtocolViolation(f"{stream.peer_id} proposed {MAX_PROPOSALS} protocols, none spoken here", stream.peer_id)


def encode_message(text: str) -> bytes:
    data = text.encode() + b"\n"
    assert len(data) <= MAX_MESSAGE_BYTES, f"protocol id too long: {text}"
    return bytes([len(data)]) + data


async def read_message(stream: ByteStream) -> str:
    """One message and not a byte more, so that what follows is the protocol's."""
    length = (await read_exactly(stream, 1))[0]
    if not 0 < length <= MAX_MESSAGE_BYTES:
        raise ProtocolViolation(f"{stream.peer_id} sent a negotiation message of length byte {length}", stream.peer_id)
    data = await read_exactly(stream, length)
    if not data.endswith(b"\n") or not data.isascii():
        raise ProtocolViolation(f"{stream.peer_id} sent {data!r} where a line of text was due", stream.peer_id)
    return data[:-1].decode("ascii")


async def read_exactly(stream: ByteStream, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        more = await stream.read(num_bytes - len(data))
        if not more:
            raise ConnectionLost(f"{stream.peer_id} closed the stream in the middle of an agreement", stream.peer_id)
        data += more
    return data
