"""Being reachable through a relay, as its holder sees it: asking for a reservation, keeping it, noticing its end.

A reservation lives with the stream on which it was asked for: it is renewed there, and when the stream breaks, the
relay has gone or lets us go. It knows nothing of which relay to ask (`relay_keeper.py`), nor of the circuits that come
in (`circuits.py`).
"""

import ipaddress

import trio

from p2pswarm.core.errors import (
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    NetworkError,
    ProtocolViolation,
    RelayRefused,
)
from p2pswarm.core.ids import PeerId
from p2pswarm.net.addresses import CircuitAddress, TcpAddress, parse_tcp_address
from p2pswarm.net.nat.relay_messages import (
    HOP_PROTOCOL,
    REASONS,
    RelayAnswer,
    RelayStatus,
    ReserveRequest,
    encode_hop,
    read_hop_answer,
)
from p2pswarm.net.network import Network, Stream

RESERVE_TIMEOUT_S = 10.0
"""Until a relay must have answered, finding it and the handshake with it included."""
RENEWAL_INTERVAL_S = 600.0
"""A sixth of what our relays grant: no clocks need to be compared, and it costs 100 bytes."""
MAX_PUBLISHED_ADDRESSES = 3
"""Of one relay. Each is one more for every announcement to carry and for every client to try."""


class Reservation:
    """A place on one relay, made by `reserve`; `hold` it, and `release` it in the end."""

    def __init__(self, stream: Stream, addresses: tuple[str, ...]) -> None:
        self.relay_id = stream.peer_id
        self.addresses = addresses
        """Circuit addresses for others to dial, without our peer id at their end."""
        self._stream = stream

    async def hold(self) -> str:
        """Renews it for as long as the relay is there and agrees; returns why that is over. Releases it."""
        try:
            while True:
                with trio.move_on_after(RENEWAL_INTERVAL_S) as until_renewal:
                    await self._stream.read(1)
                if not until_renewal.cancelled_caught:
                    return f"relay {self.relay_id} ended the reservation"
                await _ask(self._stream)
        except (NetworkError, ProtocolViolation) as error:
            return str(error)
        finally:
            self.release()

    def release(self) -> None:
        """Gives the place back. Circuits that are open go on."""
        self._stream.reset()


async def reserve(network: Network, relay_id: PeerId) -> Reservation:
    """Asks the peer, whose addresses the network knows, to let others reach us through it.

    Raises `RelayRefused` with the reason, other kinds of `NetworkError`, or `ProtocolViolation`: it is no relay.
    """
    network.expect_circuits(relay_id)
    with trio.move_on_after(RESERVE_TIMEOUT_S):
        stream = await network.open_stream(relay_id, HOP_PROTOCOL)
        try:
            answer = await _ask(stream)
            path = network.path(relay_id)
            seen_at = path.remote if path is not None else None
            return Reservation(stream, circuit_addresses(relay_id, answer.addresses, seen_at))
        except BaseException:
            stream.reset()
            raise
    raise DeadlineExceeded(f"relay {relay_id} did not answer within {RESERVE_TIMEOUT_S:g} s", relay_id)


async def _ask(stream: Stream) -> RelayAnswer:
    await stream.write(encode_hop(ReserveRequest()))
    with trio.move_on_after(RESERVE_TIMEOUT_S):
        answer = await read_hop_answer(stream)
        if answer.status != RelayStatus.OK:
            raise RelayRefused(f"relay {stream.peer_id} refused: {REASONS[answer.status]}", stream.peer_id)
        return answer
    raise ConnectionLost(f"relay {stream.peer_id} did not answer within {RESERVE_TIMEOUT_S:g} s", stream.peer_id)


def circuit_addresses(relay_id: PeerId, told: tuple[str, ...], seen_at: TcpAddress | None) -> tuple[str, ...]:
    """Where others reach us through the relay: by its public addresses where it has any, never by a loopback one
    unless that is how we reach it ourselves, on one machine. Pure."""
    addresses = []
    for text in told:
        try:
            addresses.append(parse_tcp_address(text.removesuffix(f"/p2p/{relay_id}")))
        except ConfigError:
            continue  # of a kind that we do not speak
    if seen_at is not None and (not addresses or seen_at.port in [address.port for address in addresses]):
        # Where we have dialled it ourselves, which it may not know: a machine behind a router that forwards its port.
        addresses = [seen_at, *(address for address in addresses if address != seen_at)]
    is_local = seen_at is not None and _is_loopback(seen_at)
    usable = [address for address in addresses if address.is_dialable and (is_local or not _is_loopback(address))]
    best = [address for address in usable if _is_public(address)] or usable
    return tuple(str(CircuitAddress(address, relay_id)) for address in best[:MAX_PUBLISHED_ADDRESSES])


def _is_loopback(address: TcpAddress) -> bool:
    return address.kind.startswith("ip") and ipaddress.ip_address(address.host).is_loopback


def _is_public(address: TcpAddress) -> bool:
    return not address.kind.startswith("ip") or ipaddress.ip_address(address.host).is_global
