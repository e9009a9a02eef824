"""What a server that is asked says of its work: sums and averages. Nothing of any single peer is among them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """At one moment; rates are over the last half minute, sums since the server began or took its blocks."""

    uptime_s: float
    num_sessions: int
    num_waiting: int
    """Requests that wait for the device."""
    mean_batch_rows: float
    """Rows of the decode steps that ran together, on average since the blocks were loaded; 0 before the first."""
    cache_tokens_used: int
    cache_tokens_total: int
    num_evicted: int
    """Sessions that had to leave a full KV cache."""
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    forward_tokens_per_s: float
    sent_bytes: int
    received_bytes: int
    num_errors: int
    """Requests that were refused or failed."""
    num_moves: int
    """To other blocks."""
