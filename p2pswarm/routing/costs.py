"""What a route costs: the expected time of one decoded token, in whole microseconds.

Integers, so that sums are the same in whatever order they are made: a planner that repairs an old plan (D* Lite)
compares costs for equality, and ties are broken alike on every machine.

    a token's time = over the hops (round trip to the server + our overhead a hop)
                   + over the blocks 1 / the declared decode rate

The client relays between hops, so that each hop costs its whole round trip: half on the way in, half on the way out.
"""

from dataclasses import dataclass

from p2pswarm.core.server_info import ServerInfo

MICROSECONDS_PER_S = 1_000_000


@dataclass(frozen=True, slots=True)
class CostModel:
    """The constants behind every edge of the routing graph."""

    hop_overhead_s: float = 0.002
    """Framing, queueing and a thread hand-over at the server, beside the network's round trip."""
    unknown_round_trip_s: float = 0.15
    """Assumed for a server never talked to: a far one, so that measured near ones are preferred."""
    longest_round_trip_s: float = 5.0
    """Longer measurements, infinite ones too, count as this, so that sums stay comparable."""
    no_room_penalty_s: float = 10.0
    """Added where the announced KV cache cannot hold the session: a last resort, since announcements age."""
    unknown_decode_rate_tokens_per_s: float = 300.0
    """Tokens a second through one block, for a server that announces none."""

    def half_round_trip_us(self, round_trip_s: float | None) -> int:
        """One way to the server or back."""
        if round_trip_s is None or round_trip_s < 0 or round_trip_s != round_trip_s:
            round_trip_s = self.unknown_round_trip_s
        return _microseconds(min(round_trip_s, self.longest_round_trip_s) / 2)

    def enter_us(self, server: ServerInfo, round_trip_s: float | None, cache_tokens_needed: int) -> int:
        """From the client into the server's first block."""
        cost_us = self.half_round_trip_us(round_trip_s) + _microseconds(self.hop_overhead_s)
        if cache_tokens_needed > server.cache_tokens_left:
            cost_us += _microseconds(self.no_room_penalty_s)
        return cost_us

    def block_us(self, server: ServerInfo) -> int:
        """One token through one block of the server; at least a microsecond, so that no work is free."""
        rate = server.inference_tokens_per_s
        if not rate > 0:
            rate = self.unknown_decode_rate_tokens_per_s
        return max(1, _microseconds(1 / rate))


def _microseconds(seconds: float) -> int:
    return round(seconds * MICROSECONDS_PER_S)
