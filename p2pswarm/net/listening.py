"""The way in: listeners, and from a socket that was accepted to a connection in the table.

How many may come in and whom the table makes room for is decided here; the handshake itself is in `upgrade.py`.
"""

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import psutil
import trio

from p2pswarm.core.errors import ConfigError, NetworkError
from p2pswarm.net.addresses import TcpAddress, expand_wildcards
from p2pswarm.net.admission import Source, source_of
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.connection import Connection
from p2pswarm.net.connection_table import ConnectionTable
from p2pswarm.net.door import Door
from p2pswarm.net.local_port import LocalPort
from p2pswarm.net.pace import Pace
from p2pswarm.net.paced_listener import PacedListener
from p2pswarm.net.pipe import Pipe, TcpPipe
from p2pswarm.net.upgrade import Upgrader

LISTEN_BACKLOG = 256
ACCEPTS_BURST_S = 2.0
"""Of the pace of accepting, saved up."""
INTERFACES_LIFETIME_S = 30.0
"""A laptop that changes its network is noticed this late; asking the system costs a millisecond."""
IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)

logger = logging.getLogger(__name__)


class Listening:
    """Takes in connections for one node, until `stop`."""

    def __init__(
        self,
        upgrader: Upgrader,
        table: ConnectionTable,
        local_port: LocalPort,
        config: NetworkConfig,
        nursery: trio.Nursery,
    ) -> None:
        self.is_claimed: Callable[[TcpPipe], bool] = lambda _: False
        """Whether somebody has waited for just this connection, and takes it over."""
        self._upgrader = upgrader
        self._local_port = local_port
        self._table = table
        self._config = config
        self._nursery = nursery
        self._addresses: list[TcpAddress] = []
        self._interfaces: list[str] = []
        self._interfaces_expire_s = 0.0
        self._scope = trio.CancelScope()
        self._door = Door(config)
        self._is_stopped = False

    def addresses(self) -> tuple[TcpAddress, ...]:
        """What it listens on, one address for each interface of the machine where it listens on all."""
        if trio.current_time() >= self._interfaces_expire_s:
            self._interfaces = interface_hosts()
            self._interfaces_expire_s = trio.current_time() + INTERFACES_LIFETIME_S
        return tuple(expand_wildcards(self._addresses, self._interfaces))

    def is_at(self, kind: str, port: int | None) -> bool:
        """Whether it listens on this port, at addresses of this kind."""
        return any(address.kind == kind and address.port == port for address in self._addresses)

    async def listen(self, addresses: Sequence[TcpAddress]) -> None:
        """Opens all the listeners, or none."""
        listeners: list[trio.SocketListener] = []
        try:
            for address in addresses:
                opened = await _open_listener(address)
                listeners.append(opened)
                self._local_port.share(opened, address.kind)
                self._addresses.append(TcpAddress(address.kind, address.host, opened.socket.getsockname()[1]))
        except BaseException:
            for listener in listeners:
                listener.socket.close()
            raise
        if listeners:
            self._nursery.start_soon(self._accept_sockets, listeners)

    async def run(self) -> None:
        """Lets strangers in, in turn, until cancelled."""
        await self._door.run()

    def stop(self) -> None:
        self._is_stopped = True
        self._scope.cancel()

    async def _accept_sockets(self, listeners: list[trio.SocketListener]) -> None:
        rate_per_s = self._config.max_accepts_per_s
        pace = Pace(rate_per_s, rate_per_s * ACCEPTS_BURST_S, trio.current_time())
        paced = [PacedListener(listener, pace) for listener in listeners]
        with self._scope:
            await trio.serve_listeners(self.accept_socket, paced, handler_nursery=self._nursery)

    async def accept_socket(self, stream: trio.SocketStream) -> None:
        """The whole life of a TCP connection over which the other side speaks first."""
        pipe = TcpPipe(stream)
        if not self.is_claimed(pipe):
            await self.accept(pipe, partial(trio.lowlevel.wait_readable, stream.socket))
        await pipe.wait_closed()  # trio closes the socket when this returns

    async def accept(
        self, pipe: Pipe, said_something: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
    ) -> None:
        """Makes a connection of what a peer opened and hands it to the table, or closes the pipe.

        `said_something` returns once the first bytes have come.
        """
        source = source_of(pipe.path)
        if not self._can_take_one_more(source) or self._is_shut_out(source):
            await pipe.aclose()
            return
        try:
            connection = await self._door.admit(source, said_something, partial(self._upgrader.accepted, pipe))
        except NetworkError as error:
            logger.debug("an incoming connection came to nothing: %s", error)
            await pipe.aclose()
            return
        if connection is None:
            return
        if self._table.is_barred(connection.peer_id):
            self._door.note_failure(source)
        elif len(self._table.of(connection.peer_id)) >= self._config.max_connections_per_peer:
            logger.debug("%s has too many connections already, one more is refused", connection.peer_id)
            self._door.note_failure(source)
            self._table.note_offence(connection.peer_id)
        elif self._can_take_one_more(source):
            self._table.make_room(source)
            self._table.adopt(connection, is_dialled=False)
            return
        await _discard(connection)

    def _can_take_one_more(self, source: Source) -> bool:
        return not self._is_stopped and self._table.can_take_one_more(source)

    def _is_shut_out(self, source: Source) -> bool:
        """Not where somebody from there is connected: who shares an address with strangers pays for them by waiting."""
        return self._door.is_shut_to(source) and not any(
            source_of(connection.path) == source for connection in self._table
        )


async def _discard(connection: Connection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await connection.close()


async def _open_listener(address: TcpAddress) -> trio.SocketListener:
    if address.kind not in ("ip4", "ip6"):
        raise ConfigError(f"a node listens on an IP address of this machine, got {address}")
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=LISTEN_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"cannot listen on {address}: port {address.port} is taken by another program") from error
        raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from error
    assert len(listeners) == 1, "one IP address makes one listener"
    return listeners[0]


def interface_hosts() -> list[str]:
    """This machine's IP addresses that can be dialled; link-local ones need more than an address."""
    hosts = [
        entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in IP_FAMILIES
    ]
    return [host for host in hosts if not host.startswith("fe80:") and not host.startswith("169.254.")]
