"""Lanes: TCP connections to a relay over which the bytes of one circuit go bare, in place of streams.

Over streams each byte of a circuit is encrypted twice at both ends, and the relay decrypts and encrypts it once more,
though only the inner layer, from end to end, keeps anything secret. Over a lane from either end there is just that one,
and the relay copies from socket to socket.

Who opens a lane says so where others begin their handshake (`LANE_PROTOCOL`), and then its ticket: a random number that
the relay told over the encrypted connection there is, good for one lane. When both ends' lanes are wanted, and what a
circuit has without them, is in `relay.py` and `circuits.py`.
"""

import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.path import ConnectionPath
from p2pswarm.net.pipe import Pipe, TcpPipe

LANE_PROTOCOL = ProtocolId("/p2pswarm/lane/1")
TICKET_BYTES = 32


class LanePipe(TcpPipe):
    """A lane as the end of a circuit that has opened it sees it: the way to the circuit's other end."""

    def __init__(self, stream: trio.SocketStream, relay_id: PeerId) -> None:
        super().__init__(stream, ConnectionPath(relay=relay_id))
        self.end_circuit: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Tells the relay, which passes on what came last and ends the circuit's streams."""

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            with trio.CancelScope(shield=True):
                await self.end_circuit()


class Lane:
    """A lane as the relay sees it: read and written like a stream."""

    def __init__(self, pipe: TcpPipe) -> None:
        self.read = pipe.receive_some
        self.write = pipe.send_all
        self.close_write = pipe.send_eof
        self.reset = pipe.close_now


class ExpectedLane:
    """One that somebody is told to open."""

    def __init__(self) -> None:
        self.ticket = secrets.token_bytes(TICKET_BYTES)
        self.lane: Lane | None = None
        self.has_come = trio.Event()


class ExpectedLanes:
    """All those that one node expects."""

    def __init__(self) -> None:
        self._by_ticket: dict[bytes, ExpectedLane] = {}

    @contextmanager
    def expect(self) -> Iterator[ExpectedLane]:
        """One lane, which is closed at the end, if it has come."""
        expected = ExpectedLane()
        self._by_ticket[expected.ticket] = expected
        try:
            yield expected
        finally:
            self._by_ticket.pop(expected.ticket, None)
            if expected.lane is not None:
                expected.lane.reset()

    def take(self, pipe: Pipe, ticket: bytes) -> None:
        """Somebody wants `pipe` to be a lane and has shown a ticket. Raises `ConnectionLost`: it is good for none."""
        if not isinstance(pipe, TcpPipe) or ticket not in self._by_ticket:
            raise ConnectionLost("no lane is expected with the ticket that it shows")
        expected = self._by_ticket.pop(ticket)
        expected.lane = Lane(pipe)
        expected.has_come.set()
