"""From a circuit through a relay to a direct connection, through the routers of both sides: hole punching over TCP.

Theory of operation. A router lets in what answers a packet from inside. When both nodes dial each other at the same
time, each from the port that it always dials from, each one's first packet opens its own router for the other's. The
protocol is libp2p's DCUtR; `I` dialled the circuit, `R` was called through it and begins:

    R   CONNECT, where I may be seen; the time until the answer is a round trip
    I   CONNECT, where I may be seen
    R   SYNC; half a round trip later it dials
    I   dials as soon as that has come

However the TCP connection came about, dialled, accepted or both at once, `I` speaks first over it. Then the relayed
connection moves to it, open streams and all (`mux_transports.py`); one of stock libp2p stays where it is, beside a
direct one for new streams. Where the routers answer or change ports it comes to nothing, and the circuit is left as it
was; another try follows minutes later.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

import trio

from p2pswarm.core.errors import NetworkError, ProtocolViolation, RemoteError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.connection import Connection
from p2pswarm.net.connection_table import ConnectionTable
from p2pswarm.net.listening import Listening, interface_hosts
from p2pswarm.net.local_port import LocalPort
from p2pswarm.net.mux_connection import MuxConnection
from p2pswarm.net.nat.hole_punch_messages import (
    DCUTR_PROTOCOL,
    MAX_ADDRESSES,
    encode_connect,
    encode_sync,
    read_connect,
    read_sync,
)
from p2pswarm.net.nat.punch_addresses import own_candidates, worth_dialling
from p2pswarm.net.negotiation import propose
from p2pswarm.net.network import Stream
from p2pswarm.net.pipe import TcpPipe
from p2pswarm.net.upgrade import Upgrader

ARRANGE_TIMEOUT_S = 5.0
"""For the three messages, over a slow relay."""
PUNCH_TIMEOUT_S = 5.0
"""TCP repeats a lost first packet after 1 s and 3 s; a handshake over half the globe takes another."""
KNOCK_STAGGER_S = 0.25
"""Between a peer's addresses, the likeliest first: where several lead to it, one connection is enough."""
HANDSHAKE_TIMEOUT_S = 2.0
"""Over each connection that came about; more than one may, and not all lead to the peer."""
PAUSES_S = (0.0, 1.0, 3.0)
"""Before each of three tries."""
RETRY_INTERVAL_S = 300.0
"""Routers and networks change."""
MAX_PIPES = 2 * MAX_ADDRESSES
"""TCP connections of one punch: to each address, and as many accepted."""
MAX_PUNCHES = 16
"""At once, and as many again that others begin: each takes a few sockets for some seconds."""

logger = logging.getLogger(__name__)

WhereSeen = Callable[[PeerId], Awaitable[TcpAddress | None]]


class HolePuncher:
    """Punches for one node. `where_seen` asks a relay at which address it sees us; `nursery` outlives a punch."""

    def __init__(
        self,
        table: ConnectionTable,
        listening: Listening,
        upgrader: Upgrader,
        local_port: LocalPort,
        where_seen: WhereSeen,
        nursery: trio.Nursery,
    ) -> None:
        self._table = table
        self._listening = listening
        self._upgrader = upgrader
        self._local_port = local_port
        self._where_seen = where_seen
        self._nursery = nursery
        self._begun = trio.CapacityLimiter(MAX_PUNCHES)
        self._led: dict[PeerId, _Attempt] = {}

    # The side that was called (R)

    async def straighten(self, connection: Connection) -> None:
        """Tries, now and again, until `connection`, which came through a relay, is direct. Cancel it when that ends."""
        while True:
            for pause_s in PAUSES_S:
                await trio.sleep(pause_s)
                if self._has_direct(connection.peer_id):
                    return
                try:
                    async with self._begun:
                        await self._begin(connection)
                except ProtocolViolation as error:
                    logger.debug("%s does not punch: %s", connection.peer_id, error)
                    return
                except NetworkError as error:
                    logger.debug("no hole was punched to %s: %s", connection.peer_id, error)
            await trio.sleep(RETRY_INTERVAL_S)

    def _has_direct(self, peer_id: PeerId) -> bool:
        best = self._table.best(peer_id)
        return best is not None and best.path.is_direct

    async def _begin(self, connection: Connection) -> None:
        own = await self._own_addresses(connection)
        with trio.move_on_after(ARRANGE_TIMEOUT_S) as silence:
            theirs = await _arrange(connection, own)
        if silence.cancelled_caught:
            return
        with trio.move_on_after(PUNCH_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for index, address in enumerate(worth_dialling(theirs, own)):
                    nursery.start_soon(self._knock, connection, address, index * KNOCK_STAGGER_S, self._welcome)
                await trio.sleep_forever()  # what comes of it is for the other side to decide

    def _welcome(self, stream: trio.SocketStream) -> bool:
        """Whoever dialled: over this connection the other side speaks first, as over one that was accepted."""
        self._nursery.start_soon(self._listening.accept_socket, stream)
        return True

    # The side that dialled the circuit (I)

    async def answer(self, stream: Stream) -> None:
        """A stream handler for `DCUTR_PROTOCOL`."""
        connection = self._circuit_to(stream.peer_id)
        if connection is None or stream.peer_id in self._led or len(self._led) >= MAX_PUNCHES:
            stream.reset()
            return
        attempt = self._led[stream.peer_id] = _Attempt()
        try:
            with trio.move_on_after(ARRANGE_TIMEOUT_S) as deadline:
                attempt.theirs = await read_connect(stream)
                async with self._open_door(attempt):
                    own = await self._own_addresses(connection)
                    await stream.write(encode_connect(own))
                    await read_sync(stream)
                    deadline.deadline = trio.current_time() + PUNCH_TIMEOUT_S
                    await self._lead(connection, worth_dialling(attempt.theirs, own), attempt)
        finally:
            del self._led[stream.peer_id]
            await attempt.close_rest()

    def _circuit_to(self, peer_id: PeerId) -> Connection | None:
        """The connection that may move: one that was dialled here, through a relay."""
        for connection in self._table.of(peer_id):
            if not connection.is_closed and not connection.path.is_direct and self._table.was_dialled(connection):
                return connection
        return None

    async def _lead(self, connection: Connection, addresses: Sequence[TcpAddress], attempt: "_Attempt") -> None:
        """Takes the first TCP connection over which the peer agrees."""
        async with trio.open_nursery() as nursery:
            for index, address in enumerate(addresses):
                nursery.start_soon(self._knock, connection, address, index * KNOCK_STAGGER_S, attempt.take_stream)
            async for pipe in attempt.pipes:
                if await self._go_over(connection, pipe):
                    nursery.cancel_scope.cancel()

    async def _go_over(self, connection: Connection, pipe: TcpPipe) -> bool:
        try:
            with trio.move_on_after(HANDSHAKE_TIMEOUT_S):
                if isinstance(connection, MuxConnection):
                    await self._upgrader.move(connection, pipe)
                else:
                    direct = await self._upgrader.dialled(pipe, connection.peer_id)
                    self._table.adopt(direct, is_dialled=True)
                return True
        except (NetworkError, RemoteError) as error:
            logger.debug("no way to %s over %s: %s", connection.peer_id, pipe.path.remote, error)
        return False

    def claims(self, pipe: TcpPipe) -> bool:
        """Whether this connection, accepted by the node's listener, is part of a punch; it is taken over then."""
        return any(pipe.path.remote in attempt.theirs and attempt.take(pipe) for attempt in self._led.values())

    @contextlib.asynccontextmanager
    async def _open_door(self, attempt: "_Attempt") -> AsyncIterator[None]:
        """A node without a listener has one for as long as a punch takes, on the port that it dials from."""
        serve = partial(trio.serve_listeners, partial(_admit, attempt), handler_nursery=self._nursery)
        kinds = {address.kind for address in attempt.theirs}
        async with open_transparent_nursery() as nursery:
            for kind in kinds:
                if not self._listening.is_at(kind, self._local_port.ports.get(kind)):
                    with contextlib.suppress(OSError):  # of a kind that this machine has not
                        nursery.start_soon(serve, [await self._local_port.open_listener(kind)])
            yield
            nursery.cancel_scope.cancel()

    # Both sides

    async def _own_addresses(self, connection: Connection) -> list[TcpAddress]:
        relay_id = connection.path.relay
        seen_at = None if relay_id is None else await self._where_seen(relay_id)
        return own_candidates(seen_at, self._local_port.ports, interface_hosts())

    async def _knock(
        self, connection: Connection, address: TcpAddress, after_s: float, take: Callable[[trio.SocketStream], bool]
    ) -> None:
        await trio.sleep(after_s)
        if self._has_direct(connection.peer_id):
            return
        try:
            stream = await self._local_port.dial_from_here(address)
        except OSError as error:
            # Also where the other side was a little earlier, and its connection was accepted.
            logger.debug("no answer from %s: %s", address, error)
            return
        if not take(stream):
            stream.socket.close()


class _Attempt:
    """One punch that is led from here: whom it is with, and the TCP connections that come about."""

    def __init__(self) -> None:
        self.theirs: tuple[TcpAddress, ...] = ()
        self._found, self.pipes = trio.open_memory_channel[TcpPipe](MAX_PIPES)
        self._is_over = False

    def take_stream(self, stream: trio.SocketStream) -> bool:
        return self.take(TcpPipe(stream))

    def take(self, pipe: TcpPipe) -> bool:
        """Whether it is taken over."""
        if self._is_over:
            return False
        try:
            self._found.send_nowait(pipe)
        except trio.WouldBlock:
            return False
        return True

    async def close_rest(self) -> None:
        self._is_over = True
        self._found.close()
        with trio.CancelScope(shield=True):
            async for pipe in self.pipes:
                await pipe.aclose()


async def _admit(attempt: _Attempt, stream: trio.SocketStream) -> None:
    """At the door of one punch: the peer's router may have changed its port, but nobody else is expected."""
    pipe = TcpPipe(stream)
    remote = pipe.path.remote
    if remote is None or remote.host not in [address.host for address in attempt.theirs] or not attempt.take(pipe):
        await pipe.aclose()
    await pipe.wait_closed()  # trio closes the socket when this returns


async def _arrange(connection: Connection, own: Sequence[TcpAddress]) -> Sequence[TcpAddress]:
    """Tells the other side; returns, at the moment to dial, where it is to be tried."""
    stream = await connection.open_stream()
    try:
        await propose(stream, DCUTR_PROTOCOL)
        asked_s = trio.current_time()
        await stream.write(encode_connect(own))
        theirs = await read_connect(stream)
        round_trip_s = trio.current_time() - asked_s
        await stream.write(encode_sync())
        await stream.close()
    finally:
        stream.reset()
    await trio.sleep(round_trip_s / 2)
    return theirs
