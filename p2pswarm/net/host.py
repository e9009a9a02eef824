"""The real network: a node on TCP, with libp2p's noise and negotiation and our muxer.

    async with open_network(Identity.generate(), listen=["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"]) as network:
        network.serve(ProtocolId("/example/1"), handler)

A connection is dialled when a stream needs one, once for all who ask at the same time, and kept until it has been
without a stream for some minutes. How a connection comes about is in `upgrade.py`, what runs over it in
`mux_connection.py`; this file holds the table of connections and the listeners.
"""

import contextlib
import errno
import itertools
import logging
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial

import psutil
import trio

from p2pswarm.core.errors import ConfigError, ConnectionLost, NetworkError, PeerUnreachable, RemoteError
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.net.address_book import AddressBook
from p2pswarm.net.addresses import (
    TcpAddress,
    expand_wildcards,
    join_peer_address,
    parse_tcp_address,
    split_peer_address,
)
from p2pswarm.net.config import DEFAULT_CONFIG, NetworkConfig
from p2pswarm.net.connection import Connection, ConnectionStream
from p2pswarm.net.identity import Identity
from p2pswarm.net.idleness import idle_since_before, longest_idle
from p2pswarm.net.negotiation import answer, propose
from p2pswarm.net.network import Stream, StreamHandler
from p2pswarm.net.serving import run_handler
from p2pswarm.net.shared_calls import SharedCalls
from p2pswarm.net.traffic import Traffic
from p2pswarm.net.upgrade import Upgrader

MAX_INBOUND_HANDSHAKES = 128
"""At once; the dial timeout ends each. A stranger who connects and says nothing costs one of these for that long."""
LISTEN_BACKLOG = 512
LOOKS_PER_IDLE_TIMEOUT = 4
"""So an idle connection is closed up to a quarter of its time too late."""
INTERFACES_LIFETIME_S = 30.0
"""A laptop that changes its network is noticed this late; asking the system costs a millisecond."""
IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def open_network(
    identity: Identity,
    *,
    listen: Sequence[str] = (),
    announce: Sequence[str] = (),
    config: NetworkConfig = DEFAULT_CONFIG,
) -> AsyncIterator["Host"]:
    """A running node that listens on the given multiaddrs (none: it only dials). Raises `ConfigError`: taken port.

    `announce`: what others are told to dial, where that is not what it listens on (a forwarded port).
    """
    announced = [parse_tcp_address(address) for address in announce]
    async with open_transparent_nursery() as nursery:
        host = Host(identity, config, nursery, announced)
        try:
            nursery.start_soon(host.close_idle)
            await host.listen([parse_tcp_address(address) for address in listen])
            yield host
        finally:
            with trio.CancelScope(shield=True):
                await host.close()
            nursery.cancel_scope.cancel()


class Host:
    """A `net.network.Network`; made by `open_network`."""

    def __init__(
        self, identity: Identity, config: NetworkConfig, nursery: trio.Nursery, announced: Sequence[TcpAddress] = ()
    ) -> None:
        self._identity = identity
        self._config = config
        self._nursery = nursery
        self._upgrader = Upgrader(identity, config)
        self._book = AddressBook()
        self._dials: SharedCalls[PeerId, Connection] = SharedCalls(nursery)
        self._handlers: dict[ProtocolId, StreamHandler] = {}
        self._connections: dict[PeerId, list[Connection]] = {}
        self._dialled: set[Connection] = set()
        self._announced = tuple(announced)
        self._listening: list[TcpAddress] = []
        self._interfaces: list[str] = []
        self._interfaces_expire_s = 0.0
        self._listener_scope = trio.CancelScope()
        self._handshakes = trio.CapacityLimiter(MAX_INBOUND_HANDSHAKES)
        self._is_closing = False

    @property
    def peer_id(self) -> PeerId:
        return self._identity.peer_id

    @property
    def traffic(self) -> Traffic:
        """Bytes over all its connections so far."""
        return self._upgrader.traffic

    @property
    def addresses(self) -> tuple[str, ...]:
        reachable = self._announced or self._addresses_listened_on()
        return tuple(join_peer_address(str(address), self.peer_id) for address in reachable)

    def _addresses_listened_on(self) -> Sequence[TcpAddress]:
        if trio.current_time() >= self._interfaces_expire_s:
            self._interfaces = _interface_hosts()
            self._interfaces_expire_s = trio.current_time() + INTERFACES_LIFETIME_S
        return expand_wildcards(self._listening, self._interfaces)

    def sign(self, data: bytes) -> bytes:
        return self._identity.sign(data)

    def serve(self, protocol: ProtocolId, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    def add_addresses(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        self._book.add(peer_id, addresses)

    @property
    def connected_peers(self) -> frozenset[PeerId]:
        return frozenset(
            peer_id
            for peer_id, connections in self._connections.items()
            if any(not connection.is_closed for connection in connections)
        )

    def round_trip_s(self, peer_id: PeerId) -> float | None:
        measured = [connection.round_trip_s for connection in self._connections.get(peer_id, ())]
        return min((round_trip_s for round_trip_s in measured if round_trip_s is not None), default=None)

    # Streams

    async def open_stream(self, peer_id: PeerId, protocol: ProtocolId) -> Stream:
        connection = await self._connection_to(peer_id)
        stream = await connection.open_stream()
        stream.protocol = protocol
        try:
            with trio.move_on_after(self._config.open_stream_timeout_s) as deadline:
                await propose(stream, protocol)
            if deadline.cancelled_caught:
                raise ConnectionLost(
                    f"{peer_id} did not open a stream for {protocol} within {self._config.open_stream_timeout_s} s",
                    peer_id,
                )
        except BaseException:
            stream.reset()
            raise
        return stream

    async def _serve_stream(self, stream: ConnectionStream) -> None:
        try:
            with trio.fail_after(self._config.open_stream_timeout_s):
                stream.protocol = await answer(stream, self._handlers)
        except (NetworkError, RemoteError, trio.TooSlowError) as error:
            logger.debug("no protocol agreed for a stream of %s: %s", stream.peer_id, error)
            stream.reset()
            return
        await run_handler(self._handlers[stream.protocol], stream)

    # Dialling

    async def connect(self, address: str) -> PeerId:
        _, peer_id = split_peer_address(address)
        self._book.add(peer_id, [address])
        await self._connection_to(peer_id)
        return peer_id

    async def _connection_to(self, peer_id: PeerId) -> Connection:
        for connection in self._connections.get(peer_id, ()):
            if not connection.is_closed:
                return connection
        if self._is_closing:
            raise ConnectionLost("this node is shutting down", self.peer_id)
        return await self._dials.get(peer_id, partial(self._dial, peer_id))

    async def _dial(self, peer_id: PeerId) -> Connection:
        transports = self._book.get(peer_id)
        if peer_id == self.peer_id:
            raise PeerUnreachable("this node does not dial itself", peer_id)
        if not transports:
            raise PeerUnreachable(f"no address of {peer_id} is known", peer_id)
        failures: list[str] = []
        with trio.move_on_after(self._config.dial_timeout_s):
            connection = await self._dial_any(peer_id, transports, failures)
            if connection is not None:
                return connection
        reasons = "; ".join(failures) or f"no answer within {self._config.dial_timeout_s} s"
        raise PeerUnreachable(f"{peer_id} cannot be reached at {', '.join(transports)}: {reasons}", peer_id)

    async def _dial_any(self, peer_id: PeerId, transports: list[str], failures: list[str]) -> Connection | None:
        """The first connection that comes about; each address gets a head start over the next, or until it fails."""
        connected: list[Connection] = []

        async def try_one(transport: str, has_failed: trio.Event) -> None:
            try:
                connection = await self._dial_one(peer_id, parse_tcp_address(transport))
                connected.append(connection)
                self._book.prove(peer_id, transport)
                self._adopt(connection)  # now, since what comes next may be cancelled
                nursery.cancel_scope.cancel()
            except (OSError, NetworkError) as error:
                failures.append(f"{transport}: {error}")
            finally:
                has_failed.set()

        async with trio.open_nursery() as nursery:
            for transport in transports:
                has_failed = trio.Event()
                nursery.start_soon(try_one, transport, has_failed)
                with trio.move_on_after(self._config.dial_stagger_s):
                    await has_failed.wait()
        for surplus in connected[1:]:
            self._nursery.start_soon(surplus.close)
        return connected[0] if connected else None

    async def _dial_one(self, peer_id: PeerId, address: TcpAddress) -> Connection:
        stream = await trio.open_tcp_stream(address.host, address.port)
        return await self._upgrader.upgrade(stream, peer_id)

    async def _discard(self, connection: Connection) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            await connection.close()

    # Connections

    def _adopt(self, connection: Connection) -> None:
        """Takes up a connection that was dialled here."""
        self._remember(connection)
        self._dialled.add(connection)
        self._nursery.start_soon(self._run_connection, connection)

    def _remember(self, connection: Connection) -> None:
        self._connections.setdefault(connection.peer_id, []).append(connection)

    async def _run_connection(self, connection: Connection) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run)
                while (stream := await connection.accept_stream()) is not None:
                    # Streams that the peer has reset no longer count as open, but their handlers may still be at work.
                    if len(nursery.child_tasks) > self._config.max_streams_per_connection:
                        stream.reset()
                    else:
                        nursery.start_soon(self._serve_stream, stream)
                self._forget(connection)
        except Exception:  # isolation border: a bug in one connection must not take the node down
            logger.exception("connection to %s failed", connection.peer_id)
        finally:
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        self._dialled.discard(connection)
        connections = self._connections.get(connection.peer_id, [])
        if connection in connections:
            connections.remove(connection)
            if not connections:
                del self._connections[connection.peer_id]

    async def close_idle(self) -> None:
        """Closes, as time goes by, what was dialled here and nobody has needed for long."""
        timeout_s = self._config.idle_connection_timeout_s
        while True:
            await trio.sleep(timeout_s / LOOKS_PER_IDLE_TIMEOUT)
            idle = idle_since_before(self._dialled, trio.current_time() - timeout_s)
            for connection in idle:
                self._forget(connection)  # now, so that nobody opens a stream on it any more
            await self._close_all(idle)

    async def disconnect(self, peer_id: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        await self._close_all(list(self._connections.get(peer_id, ())))

    async def _close_all(self, connections: Sequence[Connection]) -> None:
        async with trio.open_nursery() as nursery:
            for connection in connections:
                nursery.start_soon(connection.close)

    async def close(self) -> None:
        """Stops listening, then lets every connection say good-bye."""
        self._is_closing = True
        self._listener_scope.cancel()
        await self._close_all(list(self._all_connections()))

    def _all_connections(self) -> Iterator[Connection]:
        return itertools.chain.from_iterable(self._connections.values())

    # Listening

    async def listen(self, addresses: Sequence[TcpAddress]) -> None:
        """Opens all the listeners, or none."""
        listeners: list[trio.SocketListener] = []
        try:
            for address in addresses:
                opened = await _open_listener(address)
                listeners.append(opened)
                self._listening.append(TcpAddress(address.kind, address.host, opened.socket.getsockname()[1]))
        except BaseException:
            for listener in listeners:
                listener.socket.close()
            raise
        if listeners:
            self._nursery.start_soon(self._accept, listeners)

    async def _accept(self, listeners: list[trio.SocketListener]) -> None:
        with self._listener_scope:
            await trio.serve_listeners(self._accept_one, listeners, handler_nursery=self._nursery)

    async def _accept_one(self, stream: trio.SocketStream) -> None:
        """The whole life of an incoming connection; trio closes the socket when this returns."""
        if not self._can_take_one_more():
            return
        try:
            async with self._handshakes:
                with trio.fail_after(self._config.dial_timeout_s):
                    connection = await self._upgrader.upgrade(stream, None)
        except (NetworkError, trio.TooSlowError) as error:
            logger.debug("an incoming connection came to nothing: %s", error)
            return
        if len(self._connections.get(connection.peer_id, ())) >= self._config.max_connections_per_peer:
            logger.warning("%s has too many connections already, one more is refused", connection.peer_id)
            await self._discard(connection)
        elif not self._can_take_one_more():
            await self._discard(connection)
        else:
            self._make_room()
            self._remember(connection)
            await self._run_connection(connection)

    def _can_take_one_more(self) -> bool:
        is_full = self._num_connections() >= self._config.max_connections
        return not self._is_closing and (not is_full or longest_idle(self._all_connections()) is not None)

    def _make_room(self) -> None:
        """For a newcomer, who would otherwise be kept out for as long as others hold on to what they do not use."""
        if self._num_connections() >= self._config.max_connections:
            idle = longest_idle(self._all_connections())
            assert idle is not None, "asked only where there is one"
            logger.debug("the connection to %s, idle longest of all, is closed for a newcomer", idle.peer_id)
            self._forget(idle)
            self._nursery.start_soon(idle.close)

    def _num_connections(self) -> int:
        return sum(map(len, self._connections.values()))


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


def _interface_hosts() -> list[str]:
    """This machine's IP addresses that can be dialled; link-local ones need more than an address."""
    hosts = [
        entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in IP_FAMILIES
    ]
    return [host for host in hosts if not host.startswith("fe80:") and not host.startswith("169.254.")]
