"""Multiaddr strings: what a node can listen on and dial, `/ip4/1.2.3.4/tcp/4001/p2p/12D3KooW...`.

The subset that a node of the swarm speaks (IP or DNS name, TCP, maybe a relay, a peer id at the end), checked here so
that no multiaddr object goes beyond this room. Addresses come from strangers: nothing here trusts them.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.identity import is_peer_id

MAX_ADDRESS_LETTERS = 400
"""The longest DNS name has 253 letters; the rest of an address fits in 150."""
DNS_PROTOCOLS = ("dns", "dns4", "dns6")
MAX_PORT = 65535
CIRCUIT_ENDING = "/p2p-circuit"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """`/<kind>/<host>/tcp/<port>` with `kind` one of `ip4 ip6 dns dns4 dns6`."""

    kind: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"/{self.kind}/{self.host}/tcp/{self.port}"

    @property
    def is_wildcard(self) -> bool:
        """Whether it means every interface of the machine: fine to listen on, useless to dial."""
        return self.host in ("0.0.0.0", "::")

    @property
    def is_dialable(self) -> bool:
        return self.port > 0 and not self.is_wildcard


@dataclass(frozen=True, slots=True)
class CircuitAddress:
    """`/<address of the relay>/p2p/<relay>/p2p-circuit`: through a relay that the peer holds a reservation on."""

    relay_address: TcpAddress
    relay_id: PeerId

    def __str__(self) -> str:
        return join_peer_address(str(self.relay_address), self.relay_id) + CIRCUIT_ENDING

    @property
    def is_dialable(self) -> bool:
        return self.relay_address.is_dialable


def parse_address(address: str) -> TcpAddress | CircuitAddress:
    """Any address that can be dialled, without its peer id. Raises `ConfigError` that says what was wrong with it."""
    if not address.endswith(CIRCUIT_ENDING):
        return parse_tcp_address(address)
    relay_address, relay_id = _split(address.removesuffix(CIRCUIT_ENDING))
    return CircuitAddress(parse_tcp_address(relay_address), relay_id)


def parse_tcp_address(address: str) -> TcpAddress:
    """The address without its peer id. Raises `ConfigError` that says what was wrong with it."""
    parts = address.split("/")
    if len(address) > MAX_ADDRESS_LETTERS or len(parts) != 5 or parts[0] or parts[3] != "tcp":
        raise _malformed(address, "/ip4/HOST/tcp/PORT, /ip6/HOST/tcp/PORT or /dns/NAME/tcp/PORT")
    kind, host, port = parts[1], parts[2], parts[4]
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= MAX_PORT):
        raise _malformed(address, f"a TCP port from 0 to {MAX_PORT}")
    return TcpAddress(kind, _checked_host(address, kind, host), int(port))


def _checked_host(address: str, kind: str, host: str) -> str:
    try:
        match kind:
            case "ip4":
                return str(ipaddress.IPv4Address(host))
            case "ip6":
                return str(ipaddress.IPv6Address(host))
    except ValueError as error:
        raise _malformed(address, f"an {kind.replace('ip', 'IPv')} address") from error
    if kind not in DNS_PROTOCOLS:
        raise _malformed(address, "ip4, ip6, dns, dns4 or dns6 first")
    labels = host.removesuffix(".").split(".")
    if not all(0 < len(label) <= 63 and label.replace("-", "").replace("_", "").isalnum() for label in labels):
        raise _malformed(address, "a DNS name")
    return host


def _malformed(address: str, wanted: str) -> ConfigError:
    return ConfigError(f"not a multiaddr that can be used here: wanted {wanted}, got {address[:MAX_ADDRESS_LETTERS]!r}")


def split_peer_address(address: str) -> tuple[str, PeerId]:
    """The transport part and the peer id of `/ip4/.../tcp/.../p2p/PEER_ID`. Raises `ConfigError`."""
    transport, peer_id = _split(address)
    return str(parse_address(transport)), peer_id


def _split(address: str) -> tuple[str, PeerId]:
    transport, separator, peer_id = address.rpartition("/p2p/")
    if not separator or not is_peer_id(peer_id):
        raise _malformed(address, "a peer address that ends in /p2p/PEER_ID (12D3KooW...)")
    return transport, PeerId(peer_id)


def join_peer_address(transport: str, peer_id: PeerId) -> str:
    """The inverse of `split_peer_address`."""
    return f"{transport}/p2p/{peer_id}"


def is_dialable(address: str) -> bool:
    """Whether a stranger's peer address can be tried at all: well-formed, a real port, not a wildcard."""
    try:
        transport, _ = split_peer_address(address)
        return parse_address(transport).is_dialable
    except ConfigError:
        return False


def expand_wildcards(listening: Sequence[TcpAddress], interface_hosts: Sequence[str]) -> list[TcpAddress]:
    """What others can dial: a wildcard becomes one address per interface of its family; loopback comes last."""
    expanded: dict[TcpAddress, None] = {}
    for address in listening:
        if not address.is_wildcard:
            expanded[address] = None
            continue
        version = 4 if address.kind == "ip4" else 6
        for host in interface_hosts:
            if ipaddress.ip_address(host).version == version:
                expanded[TcpAddress(address.kind, host, address.port)] = None
    return sorted(expanded, key=lambda address: _is_loopback(address.host))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
