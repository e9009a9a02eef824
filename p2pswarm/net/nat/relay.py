"""A relay: lets nodes that cannot be dialled be reached through this one, within limits.

It serves `HOP_PROTOCOL` (`relay_messages.py`) and passes on bytes that it cannot read: what goes through a circuit is
encrypted from end to end. They come and go over lanes (`lanes.py`) where both ends can open one, and else over the
streams on which the circuit was agreed. It dials nobody: a circuit leads only to a peer that holds a reservation and is
connected. Whichever end of a circuit ends, ends it; a relay keeps nothing of one that is over. What is given to whom is
decided in `relay_limits.py`.
"""

import logging
import math
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Protocol

import trio

from p2pswarm.core.clock import Clock
from p2pswarm.core.errors import (
    ConnectionLost,
    DeadlineExceeded,
    NetworkError,
    ProtocolViolation,
    RelayRefused,
    RemoteError,
)
from p2pswarm.core.ids import PeerId
from p2pswarm.net.mux_stream import MAX_FRAME_BYTES
from p2pswarm.net.nat.lanes import Lane
from p2pswarm.net.nat.relay_limits import Circuit, RelayAccounts, RelayLimits, RelayStatistics
from p2pswarm.net.nat.relay_messages import (
    HOP_PROTOCOL,
    LANE_HOP_PROTOCOL,
    LANE_STOP_PROTOCOL,
    OFFERING_LANES,
    OVER_LANE,
    OVER_STREAM,
    STOP_PROTOCOL,
    ConnectRequest,
    IncomingCircuit,
    RelayAnswer,
    RelayStatus,
    ReserveRequest,
    encode_hop,
    encode_lane_offer,
    encode_stop,
    read_hop_request,
    read_stop_answer,
)
from p2pswarm.net.network import Network, Stream

HOME_LIMITS = RelayLimits()
REQUEST_TIMEOUT_S = 8.0
"""Until a peer that has opened a stream must have said what it wants."""
CONNECT_TIMEOUT_S = 5.0
"""Until the target must have taken up a circuit: the source waits, and may have other ways to try."""
LANES_TIMEOUT_S = 1.0
"""Until both ends must have opened their lanes: three round trips of 300 ms. They wait, and can do without."""
RELAYED_PIECE_BYTES = 4 * MAX_FRAME_BYTES
"""Read at a time: full frames go on as they came, and a few together cost a sixth less than one by one. At 8 MiB/s, a
circuit that sends much delays the others by 32 ms."""
LINGER_S = 5.0
"""After one end has closed its side, for what the other may still have to say."""

logger = logging.getLogger(__name__)


class Way(Protocol):
    """What bytes come from one end by, and go to it: a `Stream` or a `Lane`."""

    async def read(self, max_bytes: int, /) -> bytes: ...

    async def write(self, data: bytes, /) -> None: ...

    async def close_write(self) -> None: ...


class Relay:
    """Relays over `network` from `serve` on, for as long as the network is open."""

    def __init__(self, network: Network, clock: Clock, limits: RelayLimits = HOME_LIMITS) -> None:
        self._network = network
        self._clock = clock
        self._accounts = RelayAccounts(limits)
        self._reservations: dict[PeerId, Stream] = {}

    def serve(self) -> None:
        self._network.serve(HOP_PROTOCOL, self._handle)
        self._network.serve(LANE_HOP_PROTOCOL, self._handle)

    def statistics(self) -> RelayStatistics:
        return self._accounts.statistics()

    async def _handle(self, stream: Stream) -> None:
        request = None
        with trio.move_on_after(REQUEST_TIMEOUT_S):
            request = await self._read_request(stream)
        match request:
            case ReserveRequest():
                await self._keep_reservation(stream)
            case ConnectRequest(target):
                await self._connect(stream, target)
            case None:
                logger.debug("%s opened a stream to this relay and asked for nothing", stream.peer_id)

    async def _read_request(self, stream: Stream) -> ReserveRequest | ConnectRequest | None:
        try:
            return await read_hop_request(stream)
        except ProtocolViolation:
            await stream.write(encode_hop(RelayAnswer(RelayStatus.MALFORMED_MESSAGE)))
            raise

    # Reservations

    async def _keep_reservation(self, stream: Stream) -> None:
        """Until its stream breaks, or it expires. libp2p's own nodes end the stream, and renew over another."""
        holder = stream.peer_id
        self._reservations[holder] = stream
        is_over = True
        try:
            with trio.CancelScope() as term:
                while (status := self._reserve(holder)) == RelayStatus.OK:
                    term.deadline = trio.current_time() + self._accounts.limits.reservation_s
                    await stream.write(encode_hop(self._granted()))
                    match await self._read_request(stream):
                        case None:
                            is_over = False
                            return
                        case ConnectRequest():
                            await stream.write(encode_hop(RelayAnswer(RelayStatus.UNEXPECTED_MESSAGE)))
                            raise ProtocolViolation(f"{holder} asks for a circuit on a reservation's stream", holder)
                await stream.write(encode_hop(RelayAnswer(status)))
        finally:
            if self._reservations.get(holder) is stream:
                del self._reservations[holder]
                if is_over:
                    self._accounts.release(holder)

    def _reserve(self, holder: PeerId) -> RelayStatus:
        path = self._network.path(holder)
        if path is None or not path.is_direct:
            return RelayStatus.PERMISSION_DENIED
        self._accounts.drop_all_but(self._network.connected_peers)
        return self._accounts.reserve(holder, trio.current_time())

    def _granted(self) -> RelayAnswer:
        limits = self._accounts.limits
        expires_at_unix_s = round(self._clock.unix_time_s() + limits.reservation_s)
        return RelayAnswer(RelayStatus.OK, limits.announced, self._network.addresses, expires_at_unix_s)

    # Circuits

    async def _connect(self, stream: Stream, target: PeerId) -> None:
        self._accounts.drop_all_but(self._network.connected_peers)
        circuit = self._accounts.open_circuit(stream.peer_id, target, trio.current_time())
        if isinstance(circuit, RelayStatus):
            await stream.write(encode_hop(RelayAnswer(circuit)))
            return
        try:
            await self._connect_to_target(stream, circuit)
        finally:
            self._accounts.close_circuit(circuit)

    async def _connect_to_target(self, near: Stream, circuit: Circuit) -> None:
        try:
            far = await self._call(circuit, with_lanes=near.protocol == LANE_HOP_PROTOCOL)
        except (NetworkError, RemoteError) as error:
            logger.debug("no circuit from %s to %s: %s", circuit.source, circuit.target, error)
            await near.write(encode_hop(RelayAnswer(RelayStatus.CONNECTION_FAILED)))
            return
        try:
            await near.write(encode_hop(RelayAnswer(RelayStatus.OK, self._accounts.limits.announced)))
            async with self._lanes(near, far) as lanes:
                await self._pass_on_both_ways(circuit, near, far, lanes)
        finally:
            near.reset()
            far.reset()

    async def _call(self, circuit: Circuit, *, with_lanes: bool) -> Stream:
        """A stream to the target, which has taken up the circuit. Raises `NetworkError`, `RemoteError`.

        It is of `LANE_STOP_PROTOCOL` where lanes may be offered and the target speaks that.
        """
        target = circuit.target
        with trio.move_on_after(CONNECT_TIMEOUT_S):
            far = await self._open_stop_stream(target, with_lanes=with_lanes)
            try:
                await far.write(encode_stop(IncomingCircuit(circuit.source, self._accounts.limits.announced)))
                status = await read_stop_answer(far)
                if status == RelayStatus.OK:
                    return far
                raise RelayRefused(f"{target} refused a circuit: {status.name}", target)
            except BaseException:
                far.reset()
                raise
        raise DeadlineExceeded(f"{target} did not take up a circuit within {CONNECT_TIMEOUT_S:g} s", target)

    async def _open_stop_stream(self, target: PeerId, *, with_lanes: bool) -> Stream:
        if with_lanes:
            try:
                return await self._network.open_stream(target, LANE_STOP_PROTOCOL)
            except ProtocolViolation:
                logger.debug("%s does not speak %s", target, LANE_STOP_PROTOCOL)
        return await self._network.open_stream(target, STOP_PROTOCOL)

    @asynccontextmanager
    async def _lanes(self, near: Stream, far: Stream) -> AsyncIterator[tuple[Lane, Lane] | None]:
        """Both ends' lanes, where they open them in time; they are told whether that is so."""
        asked = [stream for stream in (near, far) if stream.protocol in OFFERING_LANES]
        with ExitStack() as stack:
            expected = [stack.enter_context(self._network.expect_lane()) for _ in asked]
            if len(asked) == 2:
                for stream, lane in zip(asked, expected, strict=True):
                    await stream.write(encode_lane_offer(lane.ticket))
                with trio.move_on_after(LANES_TIMEOUT_S):
                    for lane in expected:
                        await lane.has_come.wait()
            come = [lane.lane for lane in expected if lane.lane is not None]
            lanes = (come[0], come[1]) if len(come) == 2 else None
            if lanes is None:
                stack.close()
            for stream in asked:
                await stream.write(OVER_STREAM if lanes is None else OVER_LANE)
            yield lanes

    async def _pass_on_both_ways(
        self, circuit: Circuit, near: Stream, far: Stream, lanes: tuple[Lane, Lane] | None
    ) -> None:
        """Until both ends have closed their sides, one has gone, or a limit is reached."""
        limit_s = self._accounts.limits.circuit_s
        near_way, far_way = lanes or (near, far)
        with trio.move_on_after(math.inf if limit_s is None else limit_s) as scope:
            async with trio.open_nursery() as watching:
                if lanes is not None:
                    watching.start_soon(self._end_with, near, scope)
                    watching.start_soon(self._end_with, far, scope)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pass_on, circuit, near_way, far_way, scope)
                    nursery.start_soon(self._pass_on, circuit, far_way, near_way, scope)
                watching.cancel_scope.cancel()

    async def _end_with(self, stream: Stream, scope: trio.CancelScope) -> None:
        """A lane does not tell that the machine at its other end has gone: the connection of its stream does."""
        try:
            await stream.read(1)
            scope.deadline = min(scope.deadline, trio.current_time() + LINGER_S)
        except ConnectionLost:
            scope.cancel()

    async def _pass_on(self, circuit: Circuit, source: Way, target: Way, scope: trio.CancelScope) -> None:
        try:
            while data := await source.read(RELAYED_PIECE_BYTES):
                now_s = trio.current_time()
                ready_at_s = self._accounts.relay(circuit, len(data), now_s)
                if self._accounts.is_used_up(circuit):
                    scope.cancel()
                if ready_at_s > now_s:
                    await trio.sleep_until(ready_at_s)
                await target.write(data)
            await target.close_write()
            scope.deadline = min(scope.deadline, trio.current_time() + LINGER_S)
        except ConnectionLost:
            scope.cancel()
