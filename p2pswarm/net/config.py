"""How a node behaves on the network: deadlines, keep-alive, and what it lets a peer make it hold.

One frozen object, shared by the real network (`net/host.py`) and the simulated one (`testing/memory_network.py`).
"""

from dataclasses import dataclass

from p2pswarm.core.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Settings of one node; the defaults suit a server and a client alike."""

    dial_timeout_s: float = 8.0
    """For one peer, all of its addresses together: TCP, the noise handshake, the choice of muxer."""
    dial_stagger_s: float = 0.25
    """Head start of each address over the next one of the same peer (RFC 8305 asks for 250 ms)."""
    open_stream_timeout_s: float = 8.0
    """Until the peer has accepted the protocol of a new stream."""
    ping_interval_s: float = 15.0
    """After this much silence the peer is asked for a sign of life."""
    ping_timeout_s: float = 10.0
    """A peer that leaves the question unanswered for this long is dropped: 25 s after it hangs, at the latest."""
    max_streams_per_connection: int = 2048
    """Open at once, opened by the peer; more are refused one by one."""
    max_unaccepted_streams: int = 1024
    """Opened by the peer, not yet taken up by us; more are refused one by one."""
    max_new_streams_per_s: float = 200.0
    """Taken up, of all peers together: an eighth of a core. More wait, unaccepted; connections take turns."""
    max_stream_window_bytes: int = 16 * MIB
    """How far a stream's receive window may grow: what a long, fat link can have in flight."""
    max_receive_bytes_per_connection: int = 128 * MIB
    """Unread in all streams together, before no more is taken from the peer; windows grow out of one half of it."""
    max_receive_bytes: int = 512 * MIB
    """The same for all connections together: then no more is taken from those that leave more than 256 KiB."""
    max_connections: int = 1024
    """At this limit the one that has been idle longest is closed for a newcomer."""
    max_connections_per_peer: int = 8
    max_accepts_per_s: float = 80.0
    """Connections taken from the system, of all together: a fifteenth of a core if nothing comes of them."""
    max_entrants: int = 256
    """Strangers in their handshakes, waiting for them, or silent. One more, and the address with the most loses one."""
    first_bytes_timeout_s: float = 3.0
    """Who has said nothing for so long is no longer listened to."""
    handshake_share: float = 0.05
    """Of the time of the thread that runs the network; more handshakes than fit into it wait for their turn."""
    handshake_burst_s: float = 0.25
    """Of that time, saved up while nobody comes: some eighty handshakes in a row."""
    punch_holes: bool = True
    """Whether connections through relays become direct ones where the routers allow it."""
    idle_connection_timeout_s: float = 300.0
    """A connection without a stream for so long is closed by the node that dialled it: dialling again takes 10 ms."""

    def __post_init__(self) -> None:
        for name in (
            "dial_timeout_s",
            "open_stream_timeout_s",
            "ping_interval_s",
            "ping_timeout_s",
            "first_bytes_timeout_s",
            "handshake_burst_s",
            "max_accepts_per_s",
            "max_new_streams_per_s",
            "idle_connection_timeout_s",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is above 0, got {getattr(self, name)}")
        for name in (
            "max_streams_per_connection",
            "max_unaccepted_streams",
            "max_connections",
            "max_connections_per_peer",
            "max_entrants",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}")
        if not 0 < self.handshake_share <= 1:
            raise ConfigError(f"handshake_share is a part of the time, above 0 and up to 1, got {self.handshake_share}")


DEFAULT_CONFIG = NetworkConfig()
