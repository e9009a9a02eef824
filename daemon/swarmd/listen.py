"""Where a node listens, as multiaddrs."""

import ipaddress
import socket

from p2pswarm.core.errors import ConfigError


def listen_addresses(host: str | None, port: int) -> tuple[str, ...]:
    """The multiaddrs for `--host` and `--port`; without a host every interface, IPv6 where the machine has it."""
    if host is None:
        return tuple(f"/{kind}/tcp/{port}" for kind in ("ip4/0.0.0.0", *(("ip6/::",) if has_ipv6() else ())))
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError as error:
        raise ConfigError(f"host: wanted an IP address to listen on (127.0.0.1, 0.0.0.0, ::), got {host!r}") from error
    return (f"/ip{address.version}/{address}/tcp/{port}",)


def has_ipv6() -> bool:
    """Whether this machine can listen on IPv6; containers, often, cannot."""
    if not socket.has_ipv6:
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
