"""The open connections of a node, by peer: who runs them, which is the best of a peer's, which have to go.

It knows nothing of how a connection comes about (`dialling.py`, `listening.py`) nor of what its streams carry. New
streams are taken up at a pace, since each costs a task and a negotiation; connections take turns. A peer that breaks
the protocol loses its connections, and for a while it gets no others.
"""

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio

from p2pswarm.core.ids import PeerId
from p2pswarm.net.admission import Source
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.connection import Connection, ConnectionStream
from p2pswarm.net.idleness import idle_since_before, who_makes_room
from p2pswarm.net.offences import Offences
from p2pswarm.net.pace import Pace

LOOKS_PER_IDLE_TIMEOUT = 4
"""So an idle connection is closed up to a quarter of its time too late."""
NEW_STREAMS_BURST_S = 5.0
"""Of the pace of new streams, saved up: a client with a thousand sessions begins them all at once."""
TOLERATED_OFFENCES = 16
"""Streams that end in a violation: of a bug one in a while, of an attack hundreds."""
OFFENCES_PERIOD_S = 60.0
FIRST_BAR_S = 30.0
LONGEST_BAR_S = 3600.0

logger = logging.getLogger(__name__)


class ConnectionTable:
    """Connections run in `nursery`; `serve_stream` is given each stream that a peer opens, and says whether the peer
    kept to the protocol."""

    def __init__(
        self,
        serve_stream: Callable[[ConnectionStream], Awaitable[bool]],
        config: NetworkConfig,
        nursery: trio.Nursery,
    ) -> None:
        self._serve_stream = serve_stream
        self._config = config
        self._nursery = nursery
        self._connections: dict[PeerId, list[Connection]] = {}
        self._dialled: set[Connection] = set()
        self._offences: Offences[PeerId] = Offences(
            tolerated=TOLERATED_OFFENCES,
            period_s=OFFENCES_PERIOD_S,
            first_bar_s=FIRST_BAR_S,
            longest_bar_s=LONGEST_BAR_S,
        )
        rate_per_s = config.max_new_streams_per_s
        self._new_streams = Pace(rate_per_s, rate_per_s * NEW_STREAMS_BURST_S, trio.current_time())
        self._stream_turns = trio.StrictFIFOLock()
        self.straighten: Callable[[Connection], Awaitable[None]] = _leave_as_it_is
        """Run for each connection that came through a relay, until it ends: finds a direct way where there is one."""

    def __len__(self) -> int:
        return sum(map(len, self._connections.values()))

    def __iter__(self) -> Iterator[Connection]:
        return itertools.chain.from_iterable(self._connections.values())

    @property
    def peers(self) -> frozenset[PeerId]:
        return frozenset(peer_id for peer_id in self._connections if self.best(peer_id) is not None)

    def of(self, peer_id: PeerId) -> Sequence[Connection]:
        """All connections with the peer, those that have just ended among them."""
        return tuple(self._connections.get(peer_id, ()))

    def best(self, peer_id: PeerId) -> Connection | None:
        """The connection that a new stream should take: the first direct one, or else the first."""
        is_open = [connection for connection in self._connections.get(peer_id, ()) if not connection.is_closed]
        return min(is_open, key=lambda connection: not connection.path.is_direct, default=None)

    def adopt(self, connection: Connection, *, is_dialled: bool) -> None:
        """Takes it up and runs it until it ends. Idle ones are closed by the side that dialled."""
        self._connections.setdefault(connection.peer_id, []).append(connection)
        if is_dialled:
            self._dialled.add(connection)
        self._nursery.start_soon(self._run, connection)

    def was_dialled(self, connection: Connection) -> bool:
        """Whether by this node."""
        return connection in self._dialled

    async def _run(self, connection: Connection) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run)
                straightening = trio.CancelScope()
                if not connection.path.is_direct and not self.was_dialled(connection):
                    nursery.start_soon(self._straighten, connection, straightening)
                while (stream := await connection.accept_stream()) is not None:
                    await self._stream_turn()
                    # Streams that the peer has reset no longer count as open, but their handlers may still be at work.
                    if len(nursery.child_tasks) > self._config.max_streams_per_connection:
                        stream.reset()
                    else:
                        nursery.start_soon(self._serve, stream)
                self._forget(connection)
                straightening.cancel()
        except Exception:  # isolation border: a bug in one connection must not take the node down
            logger.exception("connection to %s failed", connection.peer_id)
        finally:
            self._forget(connection)
        if connection.broke_protocol:
            self.note_offence(connection.peer_id, is_grave=True)

    async def _straighten(self, connection: Connection, scope: trio.CancelScope) -> None:
        with scope:
            await self.straighten(connection)

    async def _stream_turn(self) -> None:
        async with self._stream_turns:
            await trio.sleep_until(self._new_streams.ready_at_s(trio.current_time()))
            self._new_streams.spend(1, trio.current_time())

    async def _serve(self, stream: ConnectionStream) -> None:
        if not await self._serve_stream(stream):
            self.note_offence(stream.peer_id)

    def _forget(self, connection: Connection) -> None:
        self._dialled.discard(connection)
        connections = self._connections.get(connection.peer_id, [])
        if connection in connections:
            connections.remove(connection)
            if not connections:
                del self._connections[connection.peer_id]

    # Which have to go

    def is_barred(self, peer_id: PeerId) -> bool:
        """Whether the peer broke the protocol lately."""
        return self._offences.is_barred(peer_id, trio.current_time())

    def note_offence(self, peer_id: PeerId, *, is_grave: bool = False) -> None:
        """The peer did what no honest one does, or (grave) sent bytes that make no sense at all."""
        if self._offences.commit(peer_id, trio.current_time(), is_grave=is_grave):
            logger.info("%s broke the protocol, for a while it is refused", peer_id)
            for connection in self.of(peer_id):
                self._part_with(connection)

    def can_take_one_more(self, source: Source) -> bool:
        """Whether there is room for a connection from there, or somebody who makes room for it."""
        is_full = len(self) >= self._config.max_connections
        return not is_full or who_makes_room(self, source, self._config.max_connections) is not None

    def make_room(self, source: Source) -> None:
        """For a newcomer, who would otherwise be kept out for as long as others hold on to what they do not use."""
        if len(self) >= self._config.max_connections:
            leaving = who_makes_room(self, source, self._config.max_connections)
            assert leaving is not None, "asked only where there is one"
            logger.debug("the connection to %s is closed for a newcomer from %s", leaving.peer_id, source)
            self._part_with(leaving)

    def _part_with(self, connection: Connection) -> None:
        self._forget(connection)  # now, so that nobody opens a stream on it any more
        self._nursery.start_soon(connection.close)

    async def close_idle(self) -> None:
        """Closes, as time goes by, what was dialled here and nobody has needed for long."""
        timeout_s = self._config.idle_connection_timeout_s
        while True:
            await trio.sleep(timeout_s / LOOKS_PER_IDLE_TIMEOUT)
            idle = idle_since_before(self._dialled, trio.current_time() - timeout_s)
            for connection in idle:
                self._forget(connection)  # now, so that nobody opens a stream on it any more
            await close_all(idle)


async def _leave_as_it_is(connection: Connection) -> None:
    await trio.lowlevel.checkpoint()


async def close_all(connections: Sequence[Connection]) -> None:
    """Lets them say good-bye, all at the same time."""
    async with trio.open_nursery() as nursery:
        for connection in connections:
            nursery.start_soon(connection.close)
