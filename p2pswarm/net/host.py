"""The real network: a node on TCP, with libp2p's noise and negotiation and our muxer.

    async with open_network(Identity.generate(), listen=["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"]) as network:
        network.serve(ProtocolId("/example/1"), handler)

A connection is dialled when a stream needs one, once for all who ask at the same time, and kept until it has been
without a stream for some minutes. This file is the node as the rest of the house sees it; the way out is in
`dialling.py`, the way in in `listening.py`, what both come to in `upgrade.py`, and `connection_table.py` keeps it.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import trio

from p2pswarm.core.errors import ConnectionLost, NetworkError, PeerUnreachable, ProtocolViolation, RemoteError
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.net.address_book import AddressBook
from p2pswarm.net.addresses import (
    CircuitAddress,
    TcpAddress,
    join_peer_address,
    parse_address,
    parse_tcp_address,
    split_peer_address,
)
from p2pswarm.net.config import DEFAULT_CONFIG, NetworkConfig
from p2pswarm.net.connection import Connection, ConnectionStream
from p2pswarm.net.connection_table import ConnectionTable, close_all
from p2pswarm.net.dialling import Dialler
from p2pswarm.net.identity import Identity
from p2pswarm.net.listening import Listening
from p2pswarm.net.local_port import LocalPort
from p2pswarm.net.nat.circuits import IncomingCircuits, call
from p2pswarm.net.nat.hole_punch import HolePuncher
from p2pswarm.net.nat.hole_punch_messages import DCUTR_PROTOCOL
from p2pswarm.net.nat.lanes import ExpectedLane, LanePipe
from p2pswarm.net.nat.relay_messages import HOP_PROTOCOL, LANE_HOP_PROTOCOL, LANE_STOP_PROTOCOL, STOP_PROTOCOL
from p2pswarm.net.nat.seen_addresses import SeenAddresses
from p2pswarm.net.negotiation import answer, propose
from p2pswarm.net.network import Stream, StreamHandler
from p2pswarm.net.path import ConnectionPath
from p2pswarm.net.pipe import Pipe
from p2pswarm.net.private.member_exchange import MemberExchange
from p2pswarm.net.private.private_swarm import PrivateSwarm
from p2pswarm.net.serving import run_handler
from p2pswarm.net.shared_calls import SharedCalls
from p2pswarm.net.traffic import Traffic
from p2pswarm.net.upgrade import Upgrader

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def open_network(
    identity: Identity,
    *,
    listen: Sequence[str] = (),
    announce: Sequence[str] = (),
    config: NetworkConfig = DEFAULT_CONFIG,
    private: PrivateSwarm | None = None,
) -> AsyncIterator["Host"]:
    """A running node that listens on the given multiaddrs (none: it only dials). Raises `ConfigError`: taken port.

    `announce`: what others are told to dial, where that is not what it listens on (a forwarded port). `private`: the
    swarm to whose members alone it connects.
    """
    announced = [parse_tcp_address(address) for address in announce]
    async with open_transparent_nursery() as nursery:
        host = Host(identity, config, nursery, announced, private)
        try:
            nursery.start_soon(host.connections.close_idle)
            if private is not None:
                nursery.start_soon(MemberExchange(host, private.members).run)
            nursery.start_soon(host.listening.run)
            await host.listening.listen([parse_tcp_address(address) for address in listen])
            yield host
        finally:
            with trio.CancelScope(shield=True):
                await host.close()
            nursery.cancel_scope.cancel()


class Host:
    """A `net.network.Network`; made by `open_network`."""

    def __init__(
        self,
        identity: Identity,
        config: NetworkConfig,
        nursery: trio.Nursery,
        announced: Sequence[TcpAddress] = (),
        private: PrivateSwarm | None = None,
    ) -> None:
        self.connections = ConnectionTable(self._serve_stream, config, nursery)
        self.upgrader = Upgrader(identity, config, private)
        self._local_port = local_port = LocalPort()
        self.listening = Listening(self.upgrader, self.connections, local_port, config, nursery)
        self._identity = identity
        self._private = private
        self._config = config
        self._book = AddressBook()
        self._dialler = Dialler(
            self.upgrader, self._book, local_port, self._call_through_relay, self._adopt_dialled, config, nursery
        )
        self._dials: SharedCalls[tuple[PeerId, bool], Connection] = SharedCalls(nursery)
        self._incoming_circuits = IncomingCircuits(self.listening.accept, self.open_lane)
        take_up = self._incoming_circuits.take_up
        self._handlers: dict[ProtocolId, StreamHandler] = {LANE_STOP_PROTOCOL: take_up, STOP_PROTOCOL: take_up}
        self._announced = tuple(map(str, announced))
        self._published: tuple[str, ...] | None = None
        self._is_closing = False
        if config.punch_holes:
            puncher = HolePuncher(
                self.connections, self.listening, self.upgrader, local_port, SeenAddresses(self).ask, nursery
            )
            self.connections.straighten = puncher.straighten
            self.listening.is_claimed = puncher.claims
            self.serve(DCUTR_PROTOCOL, puncher.answer)

    @property
    def peer_id(self) -> PeerId:
        return self._identity.peer_id

    @property
    def traffic(self) -> Traffic:
        """Bytes over all its connections so far."""
        return self.upgrader.traffic

    @property
    def addresses(self) -> tuple[str, ...]:
        transports = self._published
        if transports is None:
            transports = self._announced or tuple(map(str, self.own_listen_addresses()))
        return tuple(join_peer_address(transport, self.peer_id) for transport in transports)

    def publish(self, addresses: Sequence[str] | None) -> None:
        own = None if addresses is None else tuple(map(self._own_transport, addresses))
        self._published = None if own is None else tuple(map(str, own))
        self._local_port.is_kept = any(isinstance(address, CircuitAddress) for address in own or ())

    def _own_transport(self, address: str) -> TcpAddress | CircuitAddress:
        return parse_address(address.removesuffix(f"/p2p/{self.peer_id}"))

    def own_listen_addresses(self) -> tuple[TcpAddress, ...]:
        return self.listening.addresses()

    def sign(self, data: bytes) -> bytes:
        return self._identity.sign(data)

    def serve(self, protocol: ProtocolId, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    def add_addresses(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        self._book.add(peer_id, addresses)

    @property
    def connected_peers(self) -> frozenset[PeerId]:
        return self.connections.peers

    def path(self, peer_id: PeerId) -> ConnectionPath | None:
        connection = self.connections.best(peer_id)
        return None if connection is None else connection.path

    def round_trip_s(self, peer_id: PeerId) -> float | None:
        measured = [connection.round_trip_s for connection in self.connections.of(peer_id)]
        return min((round_trip_s for round_trip_s in measured if round_trip_s is not None), default=None)

    # Streams

    async def open_stream(self, peer_id: PeerId, protocol: ProtocolId) -> Stream:
        return await self._open_stream_on(await self._connection_to(peer_id), protocol)

    async def _open_stream_on(self, connection: Connection, protocol: ProtocolId) -> Stream:
        peer_id = connection.peer_id
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

    async def _serve_stream(self, stream: ConnectionStream) -> bool:
        """Whether the peer kept to the protocol."""
        try:
            with trio.fail_after(self._config.open_stream_timeout_s):
                stream.protocol = await answer(stream, self._handlers)
        except (NetworkError, RemoteError, trio.TooSlowError) as error:
            logger.debug("no protocol agreed for a stream of %s: %s", stream.peer_id, error)
            stream.reset()
            return True
        return await run_handler(self._handlers[stream.protocol], stream)

    # Connections

    async def connect(self, address: str) -> PeerId:
        _, peer_id = split_peer_address(address)
        self._book.add(peer_id, [address])
        await self._connection_to(peer_id)
        return peer_id

    async def _connection_to(self, peer_id: PeerId, *, directly: bool = False) -> Connection:
        connection = self.connections.best(peer_id)
        if connection is not None and (connection.path.is_direct or not directly):
            return connection
        if self._is_closing:
            raise ConnectionLost("this node is shutting down", self.peer_id)
        if peer_id == self.peer_id:
            raise PeerUnreachable("this node does not dial itself", peer_id)
        try:
            return await self._dials.get((peer_id, directly), partial(self._dialler.dial, peer_id, directly=directly))
        except PeerUnreachable:
            if self._private is not None:
                self._private.members.check_own(self.peer_id)
            raise

    async def _call_through_relay(self, address: CircuitAddress, peer_id: PeerId) -> Pipe:
        self._book.add(address.relay_id, [str(address.relay_address)])
        connection = await self._connection_to(address.relay_id, directly=True)
        try:
            stream = await self._open_stream_on(connection, LANE_HOP_PROTOCOL)
        except ProtocolViolation:
            stream = await self._open_stream_on(connection, HOP_PROTOCOL)
        return await call(stream, peer_id, self.open_lane)

    def expect_lane(self) -> AbstractContextManager[ExpectedLane]:
        return self.upgrader.expected_lanes.expect()

    async def open_lane(self, relay_id: PeerId, ticket: bytes) -> LanePipe:
        path = self.path(relay_id)
        if path is None or path.remote is None:
            raise ConnectionLost(f"there is no direct connection to relay {relay_id}", relay_id)
        return await self._dialler.open_lane(path.remote, relay_id, ticket)

    def expect_circuits(self, relay_id: PeerId) -> None:
        self._incoming_circuits.expect_from(relay_id)

    def _adopt_dialled(self, connection: Connection) -> None:
        self.connections.adopt(connection, is_dialled=True)

    async def dial_fresh(self, address: TcpAddress, peer_id: PeerId) -> None:
        await self._dialler.dial_fresh(address, peer_id)

    async def disconnect(self, peer_id: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        await close_all(self.connections.of(peer_id))

    async def close(self) -> None:
        """Stops listening, then lets every connection say good-bye."""
        self._is_closing = True
        self.listening.stop()
        await close_all(list(self.connections))
