"""Where peers can be dialled: a bounded memory of addresses, newest kept.

Strangers fill it (DHT answers, announcements), so both the number of peers and the addresses of each are limited.
"""

from collections import OrderedDict
from collections.abc import Sequence

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.addresses import parse_tcp_address

MAX_ADDRESSES_PER_PEER = 8
"""A machine with IPv4 and IPv6 on a few interfaces has 4 to 6."""
MAX_PEERS = 8192


class AddressBook:
    """Transport addresses by peer; the peers not heard of for longest are forgotten first."""

    def __init__(self) -> None:
        self._transports: OrderedDict[PeerId, dict[str, None]] = OrderedDict()

    def add(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        """Remembers the addresses that can be dialled and belong to `peer_id`, with or without it at their end."""
        for address in addresses:
            transport = _transport_of(peer_id, address)
            if transport is not None:
                self._remember(peer_id, transport)

    def _remember(self, peer_id: PeerId, transport: str) -> None:
        known = self._transports.setdefault(peer_id, {})
        self._transports.move_to_end(peer_id)
        known.pop(transport, None)
        known[transport] = None
        if len(known) > MAX_ADDRESSES_PER_PEER:
            del known[next(iter(known))]
        if len(self._transports) > MAX_PEERS:
            self._transports.popitem(last=False)

    def get(self, peer_id: PeerId) -> list[str]:
        """Transport addresses of the peer, in the order they were learned."""
        return list(self._transports.get(peer_id, ()))


def _transport_of(peer_id: PeerId, address: str) -> str | None:
    try:
        parsed = parse_tcp_address(address.removesuffix(f"/p2p/{peer_id}"))
    except ConfigError:
        return None
    return str(parsed) if parsed.is_dialable else None
