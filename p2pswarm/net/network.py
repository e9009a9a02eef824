"""What the rest of the house knows of a network: `Network` and `Stream`.

`net.host` holds the real one over py-libp2p, `testing.memory_network` the simulated one; both pass
`testing.network_contract`. Read `net/host.py` next.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.nat.lanes import ExpectedLane, LanePipe
from p2pswarm.net.path import ConnectionPath

Buffer = bytes | bytearray | memoryview


class Stream(Protocol):
    """An ordered, flow-controlled, two-way flow of bytes to one authenticated peer.

    Safe under cancellation: a cancelled read has consumed nothing; a cancelled write may have sent a prefix of its
    data, so that the caller can only reset the stream, but no other stream of the connection is harmed.
    One reader and one writer at a time.
    """

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def protocol(self) -> ProtocolId: ...

    async def read(self, max_bytes: int = 1 << 20) -> bytes:
        """Up to `max_bytes`, at least one byte; `b""` when the peer has closed its side.

        Raises `ConnectionLost` when the stream was reset or the connection ended; what came before that is read first.
        """
        ...

    async def write(self, *buffers: Buffer) -> None:
        """Sends the buffers one after the other; returns when all is queued, which waits for the peer's window.

        The buffers may be changed by the caller once this has returned. Raises `ConnectionLost`.
        """
        ...

    async def close_write(self) -> None:
        """Tells the peer that no more will come (its reads end with `b""`); reading goes on."""
        ...

    def reset(self) -> None:
        """Ends both sides at once, without waiting; wakes blocked readers and writers. Safe at any time, twice too."""
        ...


StreamHandler = Callable[[Stream], Awaitable[None]]


class Network(Protocol):
    """A node's place in the network: who it is, whom it can reach, what it serves."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Own multiaddrs that others can dial, each ending in `/p2p/<peer id>`; they may change over time."""
        ...

    def publish(self, addresses: Sequence[str] | None) -> None:
        """Makes these its `addresses` from now on; None: those that it started with. Raises `ConfigError`."""
        ...

    def own_listen_addresses(self) -> tuple[TcpAddress, ...]:
        """What it listens on, one address for each interface of the machine where it listens on all."""
        ...

    async def dial_fresh(self, address: TcpAddress, peer_id: PeerId) -> None:
        """Opens a TCP connection of its own there, lets the peer prove who it is, and closes it again.

        Open connections are never used for it, so that it tells whether a stranger would get through. Set a deadline.
        Raises `ConnectionLost`.
        """
        ...

    def sign(self, data: bytes) -> bytes:
        """An ed25519 signature by this node's key; `net.identity.verify_signature` checks it."""
        ...

    def serve(self, protocol: ProtocolId, handler: StreamHandler) -> None:
        """Runs `handler` in a task of its own for each stream opened to us.

        The stream is reset when the handler raises, closed when it returns. An exception that is not a `SwarmingError`
        is logged with its traceback.
        """
        ...

    def add_addresses(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        """Remembers where a peer can be dialled (bounded per peer); addresses that do not parse are ignored."""
        ...

    async def connect(self, address: str) -> PeerId:
        """Dials a multiaddr that ends in `/p2p/<peer id>`. Raises `ConfigError` (malformed), `PeerUnreachable`."""
        ...

    async def open_stream(self, peer_id: PeerId, protocol: ProtocolId) -> Stream:
        """A new stream, over the open connection or a new one to a remembered address. Costs a round trip: reuse.

        Raises `PeerUnreachable`, `ConnectionLost`, or `ProtocolViolation` when the peer does not speak `protocol`.
        """
        ...

    def expect_circuits(self, relay_id: PeerId) -> None:
        """Takes up, from now on, the connections that peers make to this node through the relay."""
        ...

    def expect_lane(self) -> AbstractContextManager[ExpectedLane]:
        """Takes in one lane (`nat/lanes.py`) from whoever is told its ticket, and closes it in the end."""
        ...

    async def open_lane(self, relay_id: PeerId, ticket: bytes) -> LanePipe:
        """Opens the lane that a relay, to which there is a connection, expects. Raises `ConnectionLost`."""
        ...

    async def disconnect(self, peer_id: PeerId) -> None:
        """Ends the connection to the peer, if there is one."""
        ...

    @property
    def connected_peers(self) -> frozenset[PeerId]: ...

    def path(self, peer_id: PeerId) -> ConnectionPath | None:
        """How the connection that a new stream would take gets to the peer; None without a connection."""
        ...

    def round_trip_s(self, peer_id: PeerId) -> float | None:
        """The latest round trip measured by the connection's keep-alive; None where there is none yet."""
        ...
