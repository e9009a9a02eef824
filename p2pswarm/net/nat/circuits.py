"""The two ends of a circuit through a relay: calling a peer, and being called. To both it is a `Pipe` like a socket.

Its bytes go over a lane (`lanes.py`) where the relay and both ends have agreed on that, and else over the stream on
which it was asked for.

A relay is reached directly, never through another one. Circuits are taken only from relays that were asked for a
reservation, since nobody else has a reason to bring us callers. The relay itself is in `relay.py`.
"""

import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress

import trio

from p2pswarm.core.errors import ConnectionLost, ProtocolViolation, RelayRefused
from p2pswarm.core.ids import PeerId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.net.mux_stream import MuxStream
from p2pswarm.net.nat.lanes import LanePipe
from p2pswarm.net.nat.relay_messages import (
    OFFERING_LANES,
    REASONS,
    ConnectRequest,
    RelayAnswer,
    RelayStatus,
    encode_hop,
    encode_stop,
    read_hop_answer,
    read_lane_offer,
    read_lane_verdict,
    read_stop_request,
)
from p2pswarm.net.network import Stream
from p2pswarm.net.path import ConnectionPath
from p2pswarm.net.pipe import Pipe

REQUEST_TIMEOUT_S = 5.0
"""Until a relay that brings a caller must have said who it is, and what its bytes go over."""
ENDING_TIMEOUT_S = 5.0
"""For a relay to pass on what came last, before the circuit's stream ends here."""

logger = logging.getLogger(__name__)

OpenLane = Callable[[PeerId, bytes], Awaitable[LanePipe]]
"""`Network.open_lane`."""


class CircuitPipe:
    """A `pipe.Pipe` that is a stream to a relay."""

    is_socket = False

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


async def call(relay_stream: Stream, peer_id: PeerId, open_lane: OpenLane) -> Pipe:
    """The circuit to `peer_id`, asked for on a new stream to a relay, which it takes over.

    The stream is of `LANE_HOP_PROTOCOL`, or of `HOP_PROTOCOL` where the relay does not speak that.

    Raises `RelayRefused` with the reason, `ConnectionLost`, `ProtocolViolation`. Set a deadline.
    """
    try:
        await relay_stream.write(encode_hop(ConnectRequest(peer_id)))
        answer = await read_hop_answer(relay_stream)
        if answer.status != RelayStatus.OK:
            raise RelayRefused(f"relay {relay_stream.peer_id} refused: {REASONS[answer.status]}", relay_stream.peer_id)
        return await _way(relay_stream, open_lane)
    except BaseException:
        relay_stream.reset()
        raise


async def _way(circuit: Stream, open_lane: OpenLane) -> Pipe:
    """What the bytes of a circuit that is agreed on go over."""
    if circuit.protocol in OFFERING_LANES:
        ticket = await read_lane_offer(circuit)
        lane = None if ticket is None else await _lane(circuit, open_lane, ticket)
        if lane is not None:
            lane.end_circuit = circuit.close_write
            return lane
    return CircuitPipe(circuit)


async def _lane(circuit: Stream, open_lane: OpenLane, ticket: bytes) -> LanePipe | None:
    """None where the relay says that the streams are to be used: one of the lanes has not come."""
    opened: list[LanePipe] = []
    with ExitStack() as unless_wanted:

        async def try_to_open() -> None:
            try:
                opened.append(await open_lane(circuit.peer_id, ticket))
                unless_wanted.callback(opened[0].close_now)
            except ConnectionLost as error:
                logger.debug("no lane to relay %s: %s", circuit.peer_id, error)

        async with open_transparent_nursery() as nursery:
            nursery.start_soon(try_to_open)
            is_wanted = await read_lane_verdict(circuit)
            if not is_wanted:
                nursery.cancel_scope.cancel()
        if not is_wanted:
            return None
        if not opened:
            raise ProtocolViolation(f"relay {circuit.peer_id} says that a lane is there which is not", circuit.peer_id)
        unless_wanted.pop_all()
    return opened[0]


class IncomingCircuits:
    """Takes up the circuits that relays bring; `accept` makes connections of them.

    They come on streams of `LANE_STOP_PROTOCOL`, or of `STOP_PROTOCOL` from relays that do not speak that.
    """

    def __init__(self, accept: Callable[[Pipe], Awaitable[None]], open_lane: OpenLane) -> None:
        self._accept = accept
        self._open_lane = open_lane
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
            pipe = await _way(stream, self._open_lane)
        if deadline.cancelled_caught:
            raise ConnectionLost(f"relay {stream.peer_id} did not say who calls, and how", stream.peer_id)
        logger.debug("%s calls through relay %s", incoming.source, stream.peer_id)
        await self._accept(pipe)
        await pipe.wait_closed()
        with trio.move_on_after(ENDING_TIMEOUT_S), suppress(ConnectionLost):
            await stream.read(1)
