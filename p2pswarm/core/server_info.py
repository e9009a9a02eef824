"""What a server tells the swarm about itself, and the facts about a model that everyone must agree on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.reachability import Reachability
from p2pswarm.core.span import Span


class ServerState(Enum):
    """Where a server stands in its life; clients route to `ONLINE` only."""

    JOINING = "joining"
    ONLINE = "online"
    DRAINING = "draining"
    OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """One server's announcement for one model."""

    peer_id: PeerId
    model_id: ModelId
    span: Span
    state: ServerState
    addresses: tuple[str, ...]
    """Multiaddrs with the peer id at their end."""
    num_model_blocks: int
    throughput_tokens_per_s: float
    """What the server as a whole sustains, the smaller of compute and network."""
    inference_tokens_per_s: float
    """Decode steps of batch 1 through one block."""
    forward_tokens_per_s: float
    """Tokens of a long prompt through one block."""
    network_tokens_per_s: float
    dtype: str
    quantization: str = "none"
    cache_tokens_left: int = 0
    """Tokens of KV cache, over all the span's blocks, not yet promised to a session."""
    max_length: int = 0
    """Longest session accepted, in tokens."""
    adapters: tuple[str, ...] = ()
    using_relay: bool = False
    """Whether some of its clients can only come to it through another node."""
    next_rtts_s: Mapping[PeerId, float] = field(default_factory=dict)
    """Measured round trips to servers likely to be next in a chain."""
    queue_delay_s: float = 0.0
    """How long a decode step waits for the device now."""
    public_name: str = ""
    version: str = ""
    next_span: Span | None = None
    """Where the server is about to move; until it has gone it still serves `span`."""
    is_pinned: bool = False
    """Its blocks were chosen by whoever runs it: it never moves."""
    reachability: Reachability = Reachability.UNKNOWN
    """What those found who tried to dial it."""
