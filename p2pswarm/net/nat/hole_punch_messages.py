"""What two nodes say to each other before they punch: the messages of libp2p's DCUtR. When is up to `hole_punch.py`."""

from collections.abc import Sequence

from p2pswarm.core.errors import ConfigError, ProtocolViolation
from p2pswarm.core.ids import ProtocolId
from p2pswarm.net.addresses import TcpAddress, parse_tcp_address
from p2pswarm.net.libp2p_parts import DecodeError, HolePunch, Multiaddr
from p2pswarm.net.nat.protobuf_frames import frame, read_due_frame
from p2pswarm.net.network import Stream

DCUTR_PROTOCOL = ProtocolId("/libp2p/dcutr")
MAX_ADDRESSES = 8
"""Heeded of a peer's, so that nobody can have us knock at more doors."""


def encode_connect(addresses: Sequence[TcpAddress]) -> bytes:
    """Try me at these."""
    message = HolePunch(type=HolePunch.CONNECT)
    message.ObsAddrs.extend(Multiaddr(str(address)).to_bytes() for address in addresses[:MAX_ADDRESSES])
    return frame(message.SerializeToString())


def encode_sync() -> bytes:
    """Dial now."""
    return frame(HolePunch(type=HolePunch.SYNC).SerializeToString())


async def read_connect(stream: Stream) -> tuple[TcpAddress, ...]:
    """Where the peer is to be tried, of the kinds that we speak. Raises `ProtocolViolation`, `ConnectionLost`."""
    message = await _read(stream)
    if message.type != HolePunch.CONNECT:
        raise ProtocolViolation(f"{stream.peer_id} sent a sync where it had to say its addresses", stream.peer_id)
    addresses = filter(None, map(_address, message.ObsAddrs[:MAX_ADDRESSES]))
    return tuple(dict.fromkeys(addresses))


async def read_sync(stream: Stream) -> None:
    """Returns at the moment to dial. Raises `ProtocolViolation`, `ConnectionLost`."""
    if (await _read(stream)).type != HolePunch.SYNC:
        raise ProtocolViolation(f"{stream.peer_id} sent its addresses where a sync was due", stream.peer_id)


async def _read(stream: Stream) -> HolePunch:
    message = HolePunch()
    try:
        message.ParseFromString(await read_due_frame(stream))
    except DecodeError as error:
        raise ProtocolViolation(f"{stream.peer_id} sent a message that does not parse", stream.peer_id) from error
    return message


def _address(data: bytes) -> TcpAddress | None:
    try:
        address = parse_tcp_address(str(Multiaddr(data)))
    except (ConfigError, ValueError):
        return None  # of a transport that we do not speak
    return address if address.is_dialable and address.kind in ("ip4", "ip6") else None
