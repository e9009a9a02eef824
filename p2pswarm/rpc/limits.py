"""The protocol's name, and what a node grants the others: how many streams and sessions, how many bytes, how long."""

from dataclasses import dataclass

from p2pswarm.core.ids import ProtocolId
from p2pswarm.wire.frames import DEFAULT_LIMITS, WireLimits

RPC_PROTOCOL = ProtocolId("/p2pswarm/rpc/1")


@dataclass(frozen=True, slots=True)
class RpcLimits:
    """Of both ends; times in seconds."""

    wire: WireLimits = DEFAULT_LIMITS

    max_streams: int = 1024
    max_streams_per_peer: int = 64
    """Sessions included; a client keeps one stream per session and a few for single calls."""
    max_sessions_per_peer: int = 32
    """Those of all peers together are bounded by the memory for their caches, which the service counts."""
    max_received_bytes: int = 1 << 30
    max_received_bytes_per_peer: int = 256 << 20
    """Bytes of requests that are still coming or not yet answered: four of the longest at once."""

    max_speed_test_bytes: int = 64 << 20
    max_speed_test_bytes_per_peer: int = 12 << 20
    """Both ways together, in a period: a peer may measure twice, a dozen peers at once."""
    speed_test_period_s: float = 60.0

    first_message_timeout_s: float = 10.0
    """As for the other times below: a message under way may take longer (`wire.framed_stream.SLOWEST_BYTES_PER_S`)."""
    idle_stream_timeout_s: float = 120.0
    first_step_timeout_s: float = 60.0
    """A session is opened when there is something to send; until then its room stands empty."""
    idle_session_timeout_s: float = 600.0
    """A person thinks between two turns of a chat; the cache is kept so long."""
    call_timeout_s: float = 300.0
    """For the service to answer, waiting for the device included."""
    send_timeout_s: float = 30.0
    """For the peer to take an answer."""
    push_wait_s: float = 10.0
    """For the step that a pushed input belongs to: its header is sent first, from farther away."""
    push_timeout_s: float = 30.0
    """For a push to be taken by the next server. Nobody waits for that."""

    max_idle_streams_per_peer: int = 4
    """Kept open by a client for its next call."""
    max_idle_streams: int = 256
    keep_idle_stream_s: float = 60.0
    """Shorter than `idle_stream_timeout_s`, so that the server rarely closes a stream that a client is about to use."""


DEFAULT_RPC_LIMITS = RpcLimits()
