"""Which transport each direction of a connection uses, while the connection moves from one to another.

Theory of operation. Two ends share a second transport, authenticated to be between the same two nodes. Each end writes
a move as its last frame on the old one and goes on over the new one; each reads the old one up to that frame, then the
new one, where what came meanwhile has waited. So no byte is lost, doubled or overtaken, and no stream notices.

The dialler leads: the listener agrees first (`begin`) and leaves once the dialler's move has come. So a move that was
not agreed is a violation, whatever the delays of either transport. The old one is closed first by the dialler, which
has then read the listener's last byte; the listener waits for that, since to close first could cost its move.

It knows nothing of frames, waits for nothing and sends nothing: `mux_connection.py` does.
"""

from collections.abc import Sequence
from typing import Protocol

from p2pswarm.core.errors import ConnectionLost, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.net.path import ConnectionPath


class SecureTransport(Protocol):
    """An authenticated, encrypted flow of bytes. Raises `ConnectionLost`; `ProtocolViolation` for forged bytes."""

    async def read_some(self) -> bytes:
        """What has arrived, at least one byte; `b""` at the end."""
        ...

    async def write_all(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Sends what `write_now` has left, then the buffers."""
        ...

    def write_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
        """Takes the buffers and sends what can be sent without waiting; whether that was all."""
        ...

    async def close(self) -> None: ...


class Transports:
    """The transports of one end; `incoming` and `outgoing` differ in the middle of a move."""

    def __init__(self, transport: SecureTransport, path: ConnectionPath, peer_id: PeerId, *, is_dialler: bool) -> None:
        self.incoming = transport
        self.outgoing = transport
        self.path = path
        self.is_dialler = is_dialler
        self.has_to_leave = False
        """Whether what is sent next on `outgoing` ends with a move."""
        self._previous = transport
        self._peer_id = peer_id
        self._destination: tuple[SecureTransport, ConnectionPath] | None = None

    def begin(self, transport: SecureTransport, path: ConnectionPath) -> SecureTransport | None:
        """Agrees to move. Raises `ConnectionLost` in the middle of a move.

        The listener may agree anew until the dialler's move comes, since a dialler may give up a transport before it
        leads: the latest counts, the one before is returned for the caller to close.
        """
        if self.has_to_leave or self.incoming is not self.outgoing:
            raise ConnectionLost(f"the connection to {self._peer_id} is on the move already", self._peer_id)
        superseded = None if self._destination is None else self._destination[0]
        self._destination = transport, path
        self.has_to_leave = self.is_dialler
        return superseded

    def leave(self) -> None:
        """The last frame is on its way: from now on the other one is written to."""
        assert self._destination is not None, "who has to leave knows where to"
        self.has_to_leave = False
        self.outgoing = self._destination[0]

    def arrive(self) -> None:
        """The peer's last frame has come: from now on the other one is read. Raises `ProtocolViolation`."""
        if self._destination is None or self.incoming is self._destination[0]:
            raise ProtocolViolation(f"{self._peer_id} moved where no move was agreed", self._peer_id)
        self.incoming = self._destination[0]
        self.has_to_leave = self.outgoing is not self.incoming

    def take_left(self) -> SecureTransport | None:
        """When a move has just been completed, the one that nobody uses any more, for the caller to close."""
        if self._destination is None or not (self._destination[0] is self.incoming is self.outgoing):
            return None
        left, self._previous = self._previous, self.outgoing
        self.path = self._destination[1]
        self._destination = None
        return left

    def in_use(self) -> list[SecureTransport]:
        """Each once; for the caller to close when the connection ends."""
        destination = [] if self._destination is None else [self._destination[0]]
        return list(dict.fromkeys([self._previous, self.incoming, self.outgoing, *destination]))
