"""The port that a node dials from: the one it listens on, or else one that it keeps.

A router gives each port behind it an address of its own outside. A node that dials everybody from one port has one such
address, and where a peer sees it is where another could get through, once both try at the same time
(`nat/hole_punch.py`). Connections within this machine, where no router is, take any port, and so does a second one to
the same place, which TCP could not tell from the first. So do those of a node that others can dial: no hole is needed,
and when two dial each other at the same moment, from port to port, TCP makes one connection of the two.
"""

import errno
import ipaddress
import socket

import trio

from p2pswarm.net.addresses import TcpAddress

REUSE_PORT = getattr(socket, "SO_REUSEPORT", None)
"""Lets several sockets of one user have one port, as long as their other ends differ. Windows has no such thing."""
TAKEN = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}
WILDCARDS = {"ip4": "0.0.0.0", "ip6": "::"}
BACKLOG = 16


class LocalPort:
    """One port for each of IPv4 and IPv6."""

    def __init__(self) -> None:
        self.is_kept = True
        """Whether `dial` keeps to it; to begin with, nobody knows whether others can dial this node."""
        self.ports: dict[str, int] = {}
        """By kind of address; none before the first connection."""

    def share(self, listener: trio.SocketListener, kind: str) -> None:
        """Dials from the port of this listener from now on; the first one of its kind counts.

        Others can still not listen there: for that, both would have had to allow it before.
        """
        if REUSE_PORT is not None and kind not in self.ports:
            listener.socket.setsockopt(socket.SOL_SOCKET, REUSE_PORT, 1)
            self.ports[kind] = listener.socket.getsockname()[1]

    async def dial(self, address: TcpAddress) -> trio.SocketStream:
        """A TCP connection from this port where that can be, from any port elsewhere. Raises `OSError`."""
        if self.is_kept and _may_pass_a_router(address):
            try:
                return await self.dial_from_here(address)
            except OSError as error:
                if error.errno not in TAKEN:
                    raise
        return await trio.open_tcp_stream(address.host, address.port)

    async def dial_from_here(self, address: TcpAddress) -> trio.SocketStream:
        """A TCP connection to an IP address from this port and no other. Raises `OSError`."""
        connecting = await self._bound_socket(address.kind)
        try:
            await connecting.connect((address.host, address.port))
        except BaseException:
            connecting.close()
            raise
        return trio.SocketStream(connecting)

    async def open_listener(self, kind: str) -> trio.SocketListener:
        """Listens on this port, until closed. Raises `OSError`."""
        listening = await self._bound_socket(kind)
        listening.listen(BACKLOG)
        return trio.SocketListener(listening)

    async def _bound_socket(self, kind: str) -> trio.socket.SocketType:
        if REUSE_PORT is None:
            raise OSError(errno.EADDRINUSE, "this system does not let several sockets have one port")
        bound = trio.socket.socket(FAMILIES[kind], socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, REUSE_PORT, 1)
            if kind == "ip6":
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            await bound.bind((WILDCARDS[kind], self.ports.get(kind, 0)))
        except BaseException:
            bound.close()
            raise
        self.ports.setdefault(kind, bound.getsockname()[1])
        return bound


def _may_pass_a_router(address: TcpAddress) -> bool:
    """Names are left to the system, which may know several addresses for one."""
    return address.kind in FAMILIES and not ipaddress.ip_address(address.host).is_loopback
