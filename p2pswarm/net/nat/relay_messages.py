"""What a relay and those it serves say to each other: libp2p's circuit relay v2, checked.

Theory of operation. Who cannot be dialled opens a stream of `HOP_PROTOCOL` to a relay and asks to *reserve*. Who wants
to reach it opens another and asks the relay to *connect*; the relay opens a stream of `STOP_PROTOCOL` to the holder of
the reservation, over the connection that is open already, and tells it who is calling. When both have said OK the two
streams are one circuit: the relay passes bytes on, and the ends begin their own encrypted handshake over it. Each
message is a protobuf of the specification's, after its length as a varint.

Where relay and ends are ours, they speak protocols of our own, which begin in the same way. Then the relay *offers*
each end a lane (`lanes.py`): a byte, 1, and the ticket to open it with. When both lanes are there, it says so with
another byte, 1, and the circuit's bytes go over them; the streams are kept, since the circuit ends with them. A 0 in
place of either byte has the streams carry the bytes after all.

It knows nothing of limits or forwarding: see `relay.py`; the ends are in `circuits.py`. Vouchers are left out, as the
specification allows. See `docs/protocol-transport.md`.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeVar

from p2pswarm.core.errors import ProtocolViolation
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.identity import is_peer_id
from p2pswarm.net.libp2p_parts import ID, DecodeError, HopMessage, Multiaddr, StopMessage
from p2pswarm.net.nat.lanes import TICKET_BYTES
from p2pswarm.net.nat.protobuf_frames import frame, read_due_frame, read_frame
from p2pswarm.net.negotiation import read_exactly
from p2pswarm.net.network import Stream

HOP_PROTOCOL = ProtocolId("/libp2p/circuit/relay/0.2.0/hop")
STOP_PROTOCOL = ProtocolId("/libp2p/circuit/relay/0.2.0/stop")
LANE_HOP_PROTOCOL = ProtocolId("/p2pswarm/circuit/1/hop")
LANE_STOP_PROTOCOL = ProtocolId("/p2pswarm/circuit/1/stop")
"""Like the two above, with an offer of lanes after an OK to connect."""
OFFERING_LANES = (LANE_HOP_PROTOCOL, LANE_STOP_PROTOCOL)
MAX_ADDRESSES = 8

AnyMessage = TypeVar("AnyMessage", HopMessage, StopMessage)


class RelayStatus(IntEnum):
    """How a request ended, with the numbers of the specification."""

    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


REASONS: Final = {
    RelayStatus.OK: "it agreed",
    RelayStatus.RESERVATION_REFUSED: "it has no room for another reservation",
    RelayStatus.RESOURCE_LIMIT_EXCEEDED: "it has no room for another circuit",
    RelayStatus.PERMISSION_DENIED: "it does not serve us",
    RelayStatus.CONNECTION_FAILED: "it could not get through to the peer",
    RelayStatus.NO_RESERVATION: "the peer holds no reservation there",
    RelayStatus.MALFORMED_MESSAGE: "it did not understand the request",
    RelayStatus.UNEXPECTED_MESSAGE: "it did not expect the request",
}
"""In words, to go after "relay R refused: "."""


@dataclass(frozen=True, slots=True)
class CircuitLimit:
    """What a relay lets go through one circuit; None: no limit of the kind."""

    duration_s: int | None = None
    data_bytes: int | None = None


NO_LIMIT = CircuitLimit()


@dataclass(frozen=True, slots=True)
class ReserveRequest:
    """To a relay: let others reach me through you."""


@dataclass(frozen=True, slots=True)
class ConnectRequest:
    """To a relay: connect me with `target`."""

    target: PeerId


@dataclass(frozen=True, slots=True)
class IncomingCircuit:
    """From a relay: `source` wants to talk to you over this stream."""

    source: PeerId
    limit: CircuitLimit = NO_LIMIT


@dataclass(frozen=True, slots=True)
class RelayAnswer:
    """To each of these requests. `addresses` and `expires_at_unix_s` come with a reservation: the relay's own."""

    status: RelayStatus
    limit: CircuitLimit = NO_LIMIT
    addresses: tuple[str, ...] = ()
    expires_at_unix_s: int | None = None


# Hop: between a relay and who asks something of it


def encode_hop(message: ReserveRequest | ConnectRequest | RelayAnswer) -> bytes:
    hop = HopMessage()
    match message:
        case ReserveRequest():
            hop.type = HopMessage.RESERVE
        case ConnectRequest(target):
            hop.type = HopMessage.CONNECT
            hop.peer.id = ID.from_base58(target).to_bytes()
        case RelayAnswer(status, limit, addresses, expires_at_unix_s):
            hop.type = HopMessage.STATUS
            hop.status = int(status)  # type: ignore[assignment]  # protobuf's own enumeration, of the same numbers
            _set_limit(hop, limit)
            if expires_at_unix_s is not None:
                hop.reservation.expire = expires_at_unix_s
                hop.reservation.addrs.extend(Multiaddr(address).to_bytes() for address in addresses[:MAX_ADDRESSES])
    return frame(hop.SerializeToString())


async def read_hop_request(stream: Stream) -> ReserveRequest | ConnectRequest | None:
    """What the peer asks for; None when it has ended the stream instead. Raises `ProtocolViolation`."""
    data = await read_frame(stream)
    if data is None:
        return None
    hop = _parsed(HopMessage(), data, stream)
    if hop.type == HopMessage.RESERVE:
        return ReserveRequest()
    if hop.type == HopMessage.CONNECT:
        return ConnectRequest(_peer_id(hop.peer.id, stream))
    raise ProtocolViolation(f"{stream.peer_id} sent a status where a request to a relay was due", stream.peer_id)


async def read_hop_answer(stream: Stream) -> RelayAnswer:
    """Raises `ProtocolViolation`, and `ConnectionLost` when there is none."""
    hop = _parsed(HopMessage(), await read_due_frame(stream), stream)
    if hop.type != HopMessage.STATUS:
        raise ProtocolViolation(f"{stream.peer_id} sent a request where a relay's answer was due", stream.peer_id)
    expires_at_unix_s = hop.reservation.expire if hop.HasField("reservation") else None
    addresses = [_address(data, stream) for data in hop.reservation.addrs[:MAX_ADDRESSES]]
    return RelayAnswer(_status(hop.status, stream), _limit(hop), tuple(addresses), expires_at_unix_s)


# Stop: between a relay and the holder of a reservation


def encode_stop(message: IncomingCircuit | RelayAnswer) -> bytes:
    stop = StopMessage()
    match message:
        case IncomingCircuit(source, limit):
            stop.type = StopMessage.CONNECT
            stop.peer.id = ID.from_base58(source).to_bytes()
            _set_limit(stop, limit)
        case RelayAnswer(status):
            stop.type = StopMessage.STATUS
            stop.status = int(status)  # type: ignore[assignment]  # as above
    return frame(stop.SerializeToString())


async def read_stop_request(stream: Stream) -> IncomingCircuit:
    """Raises `ProtocolViolation`, and `ConnectionLost` when there is none."""
    stop = _parsed(StopMessage(), await read_due_frame(stream), stream)
    if stop.type != StopMessage.CONNECT:
        raise ProtocolViolation(f"{stream.peer_id} sent a status where a circuit was due", stream.peer_id)
    return IncomingCircuit(_peer_id(stop.peer.id, stream), _limit(stop))


async def read_stop_answer(stream: Stream) -> RelayStatus:
    """Raises `ProtocolViolation`, and `ConnectionLost` when there is none."""
    stop = _parsed(StopMessage(), await read_due_frame(stream), stream)
    if stop.type != StopMessage.STATUS:
        raise ProtocolViolation(f"{stream.peer_id} sent a circuit where an answer was due", stream.peer_id)
    return _status(stop.status, stream)


# Lanes: between a relay and either end of a circuit

OVER_STREAM = b"\0"
OVER_LANE = b"\1"


def encode_lane_offer(ticket: bytes) -> bytes:
    return OVER_LANE + ticket


async def read_lane_offer(stream: Stream) -> bytes | None:
    """The ticket to open a lane with; None where there is to be none. Raises like `read_lane_verdict`."""
    return await read_exactly(stream, TICKET_BYTES) if await read_lane_verdict(stream) else None


async def read_lane_verdict(stream: Stream) -> bool:
    """Whether the circuit's bytes go over lanes. Raises `ProtocolViolation`, `ConnectionLost`."""
    said = await read_exactly(stream, 1)
    if said not in (OVER_STREAM, OVER_LANE):
        raise ProtocolViolation(f"{stream.peer_id} sent {said!r} where 0 or 1 was due, for a lane", stream.peer_id)
    return said == OVER_LANE


# Fields


def _set_limit(message: HopMessage | StopMessage, limit: CircuitLimit) -> None:
    if limit.duration_s is not None:
        message.limit.duration = limit.duration_s
    if limit.data_bytes is not None:
        message.limit.data = limit.data_bytes


def _limit(message: HopMessage | StopMessage) -> CircuitLimit:
    """To the specification, 0 is no limit as well."""
    return CircuitLimit(message.limit.duration or None, message.limit.data or None)


def _status(status: int, stream: Stream) -> RelayStatus:
    try:
        return RelayStatus(status)
    except ValueError:
        known = ", ".join(str(int(known)) for known in RelayStatus)
        raise ProtocolViolation(f"{stream.peer_id} answered {status}, wanted one of {known}", stream.peer_id) from None


def _peer_id(data: bytes, stream: Stream) -> PeerId:
    peer_id = ID(data).to_base58()
    if not is_peer_id(peer_id):
        raise ProtocolViolation(f"{stream.peer_id} names a peer by {data[:64]!r}, not an ed25519 key", stream.peer_id)
    return PeerId(peer_id)


def _address(data: bytes, stream: Stream) -> str:
    try:
        return str(Multiaddr(data))
    except ValueError as error:
        raise ProtocolViolation(f"{stream.peer_id} sent {data[:64]!r}, not a multiaddr", stream.peer_id) from error


def _parsed(message: AnyMessage, data: bytes, stream: Stream) -> AnyMessage:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ProtocolViolation(f"{stream.peer_id} sent a relay message that does not parse", stream.peer_id) from error
    return message
