"""What a node asks of a connection, whichever muxer it runs: ours (`mux_connection.py`) or stock yamux."""

from typing import Protocol

from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.path import ConnectionPath
from p2pswarm.net.serving import ServedStream


class ConnectionStream(ServedStream, Protocol):
    """A stream whose protocol is not agreed yet: `protocol` is set when it is."""

    protocol: ProtocolId


class Connection(Protocol):
    """Many streams to one authenticated peer."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def path(self) -> ConnectionPath: ...

    @property
    def is_closed(self) -> bool: ...

    @property
    def broke_protocol(self) -> bool:
        """Whether it ended because the peer sent what the protocol forbids."""
        ...

    @property
    def round_trip_s(self) -> float | None: ...

    @property
    def idle_since_s(self) -> float | None:
        """When its last stream ended, or it was made, on trio's clock; None while a stream is open."""
        ...

    async def run(self) -> None:
        """Carries the streams until the connection ends; raises nothing but `Cancelled`."""
        ...

    async def open_stream(self) -> ConnectionStream:
        """Raises `ConnectionLost`."""
        ...

    async def accept_stream(self) -> ConnectionStream | None:
        """The next stream that the peer has opened; None when the connection has ended."""
        ...

    async def close(self) -> None:
        """Ends it, giving what was written a moment to go out."""
        ...
