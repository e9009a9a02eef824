"""One node of `testing/memory_network.py`: dials, connections and handlers, as `net/host.py` has them for real."""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import trio

from p2pswarm.core.errors import ConnectionLost, PeerUnreachable, ProtocolViolation
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.address_book import AddressBook
from p2pswarm.net.addresses import TcpAddress, join_peer_address, parse_address, parse_tcp_address, split_peer_address
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.identity import Identity
from p2pswarm.net.nat.lanes import ExpectedLane, ExpectedLanes, LanePipe
from p2pswarm.net.network import Stream, StreamHandler
from p2pswarm.net.path import DIRECT, ConnectionPath
from p2pswarm.net.pipe import TcpPipe
from p2pswarm.net.serving import run_handler
from p2pswarm.net.shared_calls import SharedCalls
from p2pswarm.testing.memory_connection import ConnectionEnd, Inbox, Link
from p2pswarm.testing.memory_stream import HEADER_BYTES, MemoryStream

CONNECT_ROUND_TRIPS = 6.5
"""TCP 1, choice of noise 2, the noise handshake 1.5, choice of muxer 2."""
AUTHENTICATE_ROUND_TRIPS = 4.5
"""The same without the choice of muxer."""
RETRY_INTERVAL_S = 0.5
"""How soon a handshake with a node that hung, or was cut off, goes on afterwards."""


class World(Protocol):
    """What a node asks of the network around it."""

    def link(self, one: PeerId, other: PeerId) -> Link: ...

    def is_cut(self, one: PeerId, other: PeerId) -> bool: ...

    def at(self, transport: str) -> "MemoryNode | None": ...


class MemoryNode:
    """A `net.network.Network`."""

    def __init__(
        self,
        world: World,
        identity: Identity,
        transport: str | None,
        config: NetworkConfig,
        randomness: random.Random,
        nursery: trio.Nursery,
    ) -> None:
        self.is_running = True
        self.is_hung = False
        self.inbox = Inbox()
        self._world = world
        self._identity = identity
        self._transport = transport
        self._published: tuple[str, ...] | None = None
        self._config = config
        self._random = randomness
        self._handlers: dict[ProtocolId, StreamHandler] = {}
        self._ends: dict[PeerId, list[ConnectionEnd]] = {}
        self._book = AddressBook()
        self._expected_lanes = ExpectedLanes()
        self._dials: SharedCalls[PeerId, ConnectionEnd] = SharedCalls(nursery)
        self._serving: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Takes in what arrives and runs the handlers, until `shut_down`."""
        async with trio.open_nursery() as nursery:
            self._serving = nursery
            nursery.start_soon(self.inbox.run)
            task_status.started()

    @property
    def peer_id(self) -> PeerId:
        return self._identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        transports = self._published
        if transports is None:
            transports = () if self._transport is None else (self._transport,)
        return tuple(join_peer_address(transport, self.peer_id) for transport in transports)

    def publish(self, addresses: Sequence[str] | None) -> None:
        self._published = None if addresses is None else tuple(map(self._own_transport, addresses))

    def _own_transport(self, address: str) -> str:
        return str(parse_address(address.removesuffix(f"/p2p/{self.peer_id}")))

    def own_listen_addresses(self) -> tuple[TcpAddress, ...]:
        return () if self._transport is None else (parse_tcp_address(self._transport),)

    def sign(self, data: bytes) -> bytes:
        return self._identity.sign(data)

    def serve(self, protocol: ProtocolId, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    def add_addresses(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        self._book.add(peer_id, addresses)

    async def connect(self, address: str) -> PeerId:
        _, peer_id = split_peer_address(address)
        self._book.add(peer_id, [address])
        await self._connection_to(peer_id)
        return peer_id

    async def open_stream(self, peer_id: PeerId, protocol: ProtocolId) -> Stream:
        end = await self._connection_to(peer_id)
        stream, theirs = MemoryStream(end, protocol), MemoryStream(end.twin, protocol)
        stream.twin, theirs.twin = theirs, stream
        end.streams.add(stream)
        end.transmit(HEADER_BYTES + len(protocol), partial(end.twin.on_stream, end.twin, theirs))
        try:
            with trio.move_on_after(self._config.open_stream_timeout_s) as deadline:
                is_spoken = await stream.wait_answer()
            if deadline.cancelled_caught:
                raise ConnectionLost(f"{peer_id} did not open a stream for {protocol}", peer_id)
            if not is_spoken:
                raise ProtocolViolation(f"{peer_id} does not speak {protocol}", peer_id)
        except BaseException:
            stream.reset()
            raise
        return stream

    async def dial_fresh(self, address: TcpAddress, peer_id: PeerId) -> None:
        node = self._world.at(str(address))
        if self._world.is_cut(self.peer_id, peer_id) or (node is not None and self._is_stuck(node)):
            await trio.sleep_forever()
        await trio.sleep(self._world.link(self.peer_id, peer_id).round_trip_s * AUTHENTICATE_ROUND_TRIPS)
        if node is None or not node.is_running or node.peer_id != peer_id:
            raise ConnectionLost(f"{peer_id} does not answer at {address}", peer_id)

    def expect_circuits(self, relay_id: PeerId) -> None:
        """Nobody comes through a relay here: each node can be dialled, or cannot."""

    def expect_lane(self) -> AbstractContextManager[ExpectedLane]:
        return self._expected_lanes.expect()

    async def open_lane(self, relay_id: PeerId, ticket: bytes) -> LanePipe:
        """Over a pair of sockets, without the delays of a link."""
        await trio.sleep(self._world.link(self.peer_id, relay_id).round_trip_s)
        relay = next((node for node in map(self._world.at, self._book.get(relay_id)) if node is not None), None)
        if relay is None or relay.peer_id != relay_id or not relay.is_running:
            raise ConnectionLost(f"{relay_id} does not answer", relay_id)
        ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
        try:
            relay._expected_lanes.take(TcpPipe(theirs, DIRECT), ticket)
        except ConnectionLost:
            theirs.socket.close()
        return LanePipe(ours, relay_id)

    async def disconnect(self, peer_id: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        for end in list(self._ends.get(peer_id, ())):
            end.close("disconnected here")

    @property
    def connected_peers(self) -> frozenset[PeerId]:
        return frozenset(self._ends)

    def path(self, peer_id: PeerId) -> ConnectionPath | None:
        ends = self._ends.get(peer_id)
        return ends[0].path if ends else None

    def round_trip_s(self, peer_id: PeerId) -> float | None:
        ends = self._ends.get(peer_id)
        return ends[0].link.round_trip_s if ends else None

    async def _connection_to(self, peer_id: PeerId) -> ConnectionEnd:
        await trio.lowlevel.checkpoint()
        if not self.is_running:
            raise ConnectionLost("this node was killed", self.peer_id)
        ends = self._ends.get(peer_id)
        return ends[0] if ends else await self._dials.get(peer_id, partial(self._dial, peer_id))

    async def _dial(self, peer_id: PeerId) -> ConnectionEnd:
        with trio.move_on_after(self._config.dial_timeout_s):
            return await self._shake_hands(peer_id)
        raise PeerUnreachable(f"{peer_id} did not answer within {self._config.dial_timeout_s} s", peer_id)

    async def _shake_hands(self, peer_id: PeerId) -> ConnectionEnd:
        transports = self._book.get(peer_id)
        if peer_id == self.peer_id or not transports:
            raise PeerUnreachable(f"no address of {peer_id} is known", peer_id)
        round_trip_s = self._world.link(self.peer_id, peer_id).round_trip_s
        found = [node for node in map(self._world.at, transports) if node is not None and node.peer_id == peer_id]
        if not self._world.is_cut(self.peer_id, peer_id) and not any(node.is_running for node in found):
            await trio.sleep(round_trip_s)
            raise PeerUnreachable(f"nobody answers as {peer_id} at {', '.join(transports)}", peer_id)
        await trio.sleep(round_trip_s * CONNECT_ROUND_TRIPS)
        while True:
            for node in found:
                if node.is_running and not self._is_stuck(node):
                    return self._join(node)
            await trio.sleep(RETRY_INTERVAL_S)

    def _is_stuck(self, node: "MemoryNode") -> bool:
        return self.is_hung or node.is_hung or self._world.is_cut(self.peer_id, node.peer_id)

    def _join(self, node: "MemoryNode") -> ConnectionEnd:
        ours, theirs = self._new_end(node), node._new_end(self)
        ours.twin, theirs.twin = theirs, ours
        return ours

    def _new_end(self, node: "MemoryNode") -> ConnectionEnd:
        end = ConnectionEnd(self.inbox, node.peer_id, self._random, self._on_stream, self._on_lost)
        end.link = self._world.link(self.peer_id, node.peer_id)
        end.path = ConnectionPath(remote=next(iter(node.own_listen_addresses()), None))
        self._ends.setdefault(node.peer_id, []).append(end)
        return end

    def _on_stream(self, end: ConnectionEnd, stream: MemoryStream) -> None:
        handler = self._handlers.get(stream.protocol)
        end.streams.add(stream)
        if not end.is_open or self._serving is None or len(end.streams) > self._config.max_streams_per_connection:
            stream.reset()
            return
        end.transmit(HEADER_BYTES, partial(stream.twin.answer, handler is not None))
        if handler is not None:
            self._serving.start_soon(run_handler, handler, stream)

    def _on_lost(self, end: ConnectionEnd) -> None:
        ends = self._ends[end.peer_id]
        ends.remove(end)
        if not ends:
            del self._ends[end.peer_id]

    def refresh_links(self) -> None:
        """Takes over what the world says of links, cuts and hanging."""
        for end in [end for ends in self._ends.values() for end in ends]:
            end.link = self._world.link(self.peer_id, end.peer_id)
            was_blocked = end.is_blocked
            end.set_blocked(self.is_hung or self._world.is_cut(self.peer_id, end.peer_id))
            if end.is_blocked and not was_blocked:
                end.twin.watch(self._config.ping_interval_s + self._config.ping_timeout_s)

    def hang(self) -> None:
        self.is_hung = True
        self.inbox.pause()

    def resume(self) -> None:
        self.is_hung = False
        self.inbox.resume()

    def kill(self) -> None:
        """What the kernel still held goes out; then connections break."""
        self.is_hung = False
        self.refresh_links()
        self.shut_down()
        if self._serving is not None:
            self._serving.cancel_scope.cancel()

    def shut_down(self) -> None:
        """Closes every connection; nothing can be opened any more."""
        self.is_running = False
        for end in [end for ends in self._ends.values() for end in ends]:
            end.close("this node was shut down")
