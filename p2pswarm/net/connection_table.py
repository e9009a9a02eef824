"""The open connections of a node, by peer: who runs them, which is the best of a peer's, which may go.

It knows nothing of how a connection comes about (`dialling.py`, `listening.py`) nor of what its streams carry.
"""

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio

from p2pswarm.core.ids import PeerId
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.connection import Connection, ConnectionStream
from p2pswarm.net.idleness import idle_since_before, longest_idle

LOOKS_PER_IDLE_TIMEOUT = 4
"""So an idle connection is closed up to a quarter of its time too late."""

logger = logging.getLogger(__name__)


class ConnectionTable:
    """Connections run in `nursery`; `serve_stream` is given each stream that a peer opens."""

    def __init__(
        self,
        serve_stream: Callable[[ConnectionStream], Awaitable[None]],
        config: NetworkConfig,
        nursery: trio.Nursery,
    ) -> None:
        self._serve_stream = serve_stream
        self._config = config
        self._nursery = nursery
        self._connections: dict[PeerId, list[Connection]] = {}
        self._dialled: set[Connection] = set()

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

    async def _run(self, connection: Connection) -> None:
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

    # Which may go

    def can_take_one_more(self) -> bool:
        return len(self) < self._config.max_connections or longest_idle(self) is not None

    def make_room(self) -> None:
        """For a newcomer, who would otherwise be kept out for as long as others hold on to what they do not use."""
        if len(self) >= self._config.max_connections:
            idle = longest_idle(self)
            assert idle is not None, "asked only where there is one"
            logger.debug("the connection to %s, idle longest of all, is closed for a newcomer", idle.peer_id)
            self._forget(idle)
            self._nursery.start_soon(idle.close)

    async def close_idle(self) -> None:
        """Closes, as time goes by, what was dialled here and nobody has needed for long."""
        timeout_s = self._config.idle_connection_timeout_s
        while True:
            await trio.sleep(timeout_s / LOOKS_PER_IDLE_TIMEOUT)
            idle = idle_since_before(self._dialled, trio.current_time() - timeout_s)
            for connection in idle:
                self._forget(connection)  # now, so that nobody opens a stream on it any more
            await close_all(idle)


async def close_all(connections: Sequence[Connection]) -> None:
    """Lets them say good-bye, all at the same time."""
    async with trio.open_nursery() as nursery:
        for connection in connections:
            nursery.start_soon(connection.close)
