"""What a route costs: the expected time of one decoded token, in whole microseconds.

Integers, so that sums are the same in whatever order they are made: a planner that repairs an old plan (D* Lite)
compares costs for equality, and ties are broken alike on every machine.

    a token's time = over the hops (the way in + our overhead a hop + the wait for the device)
                   + over the blocks 1 / the declared decode rate
                   + the way back to the client

A hop's way in comes from the client (half of the round trip measured from here) or, where servers hand on directly,
from the server before (half of the round trip that it announces).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from p2pswarm.core.server_info import ServerInfo

MICROSECONDS_PER_S = 1_000_000
LONGEST_TIME_S = 1e6
"""Rates of next to nothing count as this long: they come from strangers, and infinities cannot be rounded."""


class CostParts(NamedTuple):
    """What the time of one edge is made of, in microseconds."""

    network_us: int = 0
    overhead_us: int = 0
    queue_us: int = 0
    no_room_us: int = 0
    relay_us: int = 0
    compute_us: int = 0

    @property
    def total_us(self) -> int:
        return sum(self)


@dataclass(frozen=True, slots=True)
class CostModel:
    """The constants behind every edge of the routing graph."""

    hop_overhead_s: float = 0.002
    """Framing and a thread hand-over at the server, beside the network's round trip."""
    unknown_round_trip_s: float = 0.15
    """Assumed for a server never talked to: a far one, so that measured near ones are preferred."""
    longest_round_trip_s: float = 5.0
    """Longer measurements, infinite ones too, count as this, so that sums stay comparable; queues alike."""
    no_room_penalty_s: float = 10.0
    """Added where the announced KV cache cannot hold the session: a last resort, since announcements age."""
    relay_penalty_s: float = 0.05
    """Added for a server behind a relay: the relay's bandwidth is shared, and it may go away."""
    unknown_decode_rate_tokens_per_s: float = 300.0
    """Tokens a second through one block, for a server that announces none."""
    unknown_forward_rate_tokens_per_s: float = 1000.0
    """The same for long prompts."""
    unknown_network_rate_tokens_per_s: float = 1000.0
    """Tokens a second to or from a server, for one that announces none."""
    open_round_trips: int = 3
    """To open a session: a dial's hellos, and the session's own."""

    def half_round_trip_us(self, round_trip_s: float | None) -> int:
        """One way to the server or back."""
        if round_trip_s is None or round_trip_s < 0 or math.isnan(round_trip_s):
            round_trip_s = self.unknown_round_trip_s
        return microseconds(min(round_trip_s, self.longest_round_trip_s) / 2)

    def arrival(self, server: ServerInfo, cache_tokens_needed: int) -> CostParts:
        """What each hop over the server costs beside network and compute."""
        queue_s = server.queue_delay_s if server.queue_delay_s > 0 else 0.0
        return CostParts(
            overhead_us=microseconds(self.hop_overhead_s),
            queue_us=microseconds(min(queue_s, self.longest_round_trip_s)),
            no_room_us=microseconds(self.no_room_penalty_s) if cache_tokens_needed > server.cache_tokens_left else 0,
            relay_us=microseconds(self.relay_penalty_s) if server.using_relay else 0,
        )

    def block_us(self, server: ServerInfo) -> int:
        """One token through one block of the server; at least a microsecond, so that no work is free."""
        return max(1, _time_us(1, server.inference_tokens_per_s, self.unknown_decode_rate_tokens_per_s))

    def prefill_block_us(self, server: ServerInfo, num_tokens: int) -> int:
        """A prompt through one block of the server."""
        return _time_us(num_tokens, server.forward_tokens_per_s, self.unknown_forward_rate_tokens_per_s)

    def transfer_us(self, server: ServerInfo, num_tokens: int) -> int:
        """A prompt's hidden states to the server."""
        return _time_us(num_tokens, server.network_tokens_per_s, self.unknown_network_rate_tokens_per_s)


def microseconds(seconds: float) -> int:
    return round(seconds * MICROSECONDS_PER_S)


def _time_us(num_tokens: int, announced_tokens_per_s: float, otherwise_tokens_per_s: float) -> int:
    """How long that many tokens take at the announced rate, or at the other one where it says nothing."""
    rate = announced_tokens_per_s if announced_tokens_per_s > 0 else otherwise_tokens_per_s
    return microseconds(min(num_tokens / rate, LONGEST_TIME_S))
