"""Where peers can be dialled: a bounded memory of addresses, the most promising first.

Strangers fill it (DHT answers, announcements), so both the number of peers and the addresses of each are limited, and
what a stranger says never displaces an address at which the peer has answered.
"""

from collections import OrderedDict
from collections.abc import Sequence

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.addresses import parse_address

MAX_ADDRESSES_PER_PEER = 8
"""A machine with IPv4 and IPv6 on a few interfaces has 4 to 6."""
MAX_PEERS = 8192


class AddressBook:
    """Transport addresses by peer; the peers not heard of for longest are forgotten first."""

    def __init__(self) -> None:
        self._told: OrderedDict[PeerId, dict[str, None]] = OrderedDict()
        self._proven: OrderedDict[PeerId, str] = OrderedDict()

    def add(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        """Remembers the addresses that can be dialled and belong to `peer_id`, with or without it at their end."""
        for address in reversed(addresses):
            transport = _transport_of(peer_id, address)
            if transport is not None:
                self._remember(peer_id, transport)

    def _remember(self, peer_id: PeerId, transport: str) -> None:
        told = self._told.setdefault(peer_id, {})
        self._told.move_to_end(peer_id)
        told.pop(transport, None)
        told[transport] = None
        if len(told) > MAX_ADDRESSES_PER_PEER:
            del told[next(iter(told))]
        if len(self._told) > MAX_PEERS:
            self._told.popitem(last=False)

    def prove(self, peer_id: PeerId, transport: str) -> None:
        """Notes that the peer has answered there."""
        self._proven[peer_id] = transport
        self._proven.move_to_end(peer_id)
        if len(self._proven) > MAX_PEERS:
            self._proven.popitem(last=False)

    def get(self, peer_id: PeerId) -> list[str]:
        """Transport addresses of the peer: where it answered last, then the newest first."""
        transports = list(reversed(self._told.get(peer_id, {})))
        proven = self._proven.get(peer_id)
        if proven is None:
            return transports
        return [proven, *(transport for transport in transports if transport != proven)]


def _transport_of(peer_id: PeerId, address: str) -> str | None:
    try:
        parsed = parse_address(address.removesuffix(f"/p2p/{peer_id}"))
    except ConfigError:
        return None
    return str(parsed) if parsed.is_dialable else None
