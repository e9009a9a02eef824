"""The two ends of a circuit through a relay: calling a peer, and being called. To both it is a `Pipe` like a socket.

A relay is reached directly, never through another one. Circuits are taken only from relays that were asked for a
reservation, since nobody else has a reason to bring us callers. The relay itself is in `relay.py`.
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from p2pswarm.core.errors import ConnectionLost, ProtocolViolation, RelayRefused
from p2pswarm.core.ids import PeerId
from p2pswarm.net.mux_stream import MuxStream
from p2pswarm.net.nat.relay_messages import (
    REASONS,
    ConnectRequest,
    RelayAnswer,
    RelayStatus,
    encode_hop,
    encode_stop,
    read_hop_answer,
    read_stop_request,
)
from p2pswarm.net.network import Stream
from p2pswarm.net.path import ConnectionPath
from p2pswarm.net.pipe import Pipe

REQUEST_TIMEOUT_S = 5.0
"""Until a relay that brings a caller must have said who it is."""

logger = logging.getLogger(__name__)


class CircuitPipe:
    """A `pipe.Pipe` that is a stream to a relay."""

    def __init__(self, stream: Stream) -> None:
        self.path = ConnectionPath(relay=stream.peer_id)
        self._stream = stream
        self._closed = trio.Event()

    async def send_all(self, data: bytes | bytearray) -> None:
        await self._stream.write(data)

    async def receive_some(self, max_bytes: int) -> bytes:
        return await self._stream.read(max_bytes)

    def send_now(self, data: bytes | bytearray) -> int:
        return self._stream.write_now(data) if isinstance(self._stream, MuxStream) else 0

    async def aclose(self) -> None:
        self._closed.set()
        try:
            await self._stream.close_write()
        except ConnectionLost:
            return
        finally:
            self._stream.reset()

    async def wait_closed(self) -> None:
        await self._closed.wait()


async def call(relay_stream: Stream, peer_id: PeerId) -> CircuitPipe:
    """The circuit to `peer_id`, over a new stream to a relay (`HOP_PROTOCOL`), which it takes over.

    Raises `RelayRefused` with the reason, `ConnectionLost`, `ProtocolViolation`. Set a deadline.
    """
    try:
        await relay_stream.write(encode_hop(ConnectRequest(peer_id)))
        answer = await read_hop_answer(relay_stream)
        if answer.status != RelayStatus.OK:
            raise RelayRefused(f"relay {relay_stream.peer_id} refused: {REASONS[answer.status]}", relay_stream.peer_id)
    except BaseException:
        relay_stream.reset()
        raise
    return CircuitPipe(relay_stream)


class IncomingCircuits:
    """Takes up the circuits that relays bring (`STOP_PROTOCOL`); `accept` makes connections of them."""

    def __init__(self, accept: Callable[[Pipe], Awaitable[None]]) -> None:
        self._accept = accept
        self._relays: set[PeerId] = set()

    def expect_from(self, relay_id: PeerId) -> None:
        """From now on callers may come through this relay."""
        self._relays.add(relay_id)

    async def take_up(self, stream: Stream) -> None:
        """A stream handler; returns when the connection over the circuit needs it no longer."""
        with trio.move_on_after(REQUEST_TIMEOUT_S) as deadline:
            incoming = await read_stop_request(stream)
            if stream.peer_id not in self._relays:
                await stream.write(encode_stop(RelayAnswer(RelayStatus.PERMISSION_DENIED)))
                raise ProtocolViolation(f"{stream.peer_id} brings a caller and is no relay of ours", stream.peer_id)
            await stream.write(encode_stop(RelayAnswer(RelayStatus.OK)))
        if deadline.cancelled_caught:
            raise ConnectionLost(f"relay {stream.peer_id} did not say who calls", stream.peer_id)
        logger.debug("%s calls through relay %s", incoming.source, stream.peer_id)
        pipe = CircuitPipe(stream)
        await self._accept(pipe)
        await pipe.wait_closed()
