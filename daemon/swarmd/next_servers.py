"""Which servers may come next in a chain, and how far away they are: what a server finds out for its clients.

A client sees only its own round trips; those between servers it learns from announcements. Pure: who is there and what
was measured come in, who to measure and what to announce go out. `swarmd/pings.py` does the measuring.
"""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState

MAX_AT_END = 5
"""Servers measured in one round, of those that can take over where our span ends."""
MAX_WITHIN = 5
"""Of those that begin within our span: a route may leave us early."""
RISING_SHARE = 0.2
"""Of a measurement that is longer than what is known: one slow answer hardly counts."""
FALLING_SHARE = 0.5
"""Of a shorter one: noise only ever adds, most of all to the first, when both ends are still busy with their start."""
LIFETIME_S = 300.0
"""Of a measurement that is not repeated, because others were chosen meanwhile."""
MAX_KEPT = 20
"""The nearest ones: a route that is meant to be fast uses no others, and announcements stay small."""


def likely_next(info: ServerInfo, servers: Iterable[ServerInfo], random: Random) -> list[ServerInfo]:
    """Whom the server of `info` should measure now: some other ones each time, where there are many."""
    online = [server for server in servers if server.state is ServerState.ONLINE and server.peer_id != info.peer_id]
    random.shuffle(online)
    start, end = info.span.start, info.span.end
    taking_over = [server for server in online if server.span.covers(end)]
    at_end = sorted(taking_over, key=lambda server: server.span.start != end)[:MAX_AT_END]
    within = [server for server in online if start < server.span.start < end and server not in at_end]
    return at_end + within[:MAX_WITHIN]


@dataclass(frozen=True, slots=True)
class _Measured:
    round_trip_s: float
    at_s: float


class RoundTrips:
    """Smoothed round trips; each is forgotten when it is old."""

    def __init__(self) -> None:
        self._measured: dict[PeerId, _Measured] = {}

    def note(self, peer_id: PeerId, round_trip_s: float, now_s: float) -> None:
        before = self._measured.get(peer_id)
        if before is not None:
            share = RISING_SHARE if round_trip_s > before.round_trip_s else FALLING_SHARE
            round_trip_s = before.round_trip_s + share * (round_trip_s - before.round_trip_s)
        self._measured[peer_id] = _Measured(round_trip_s, now_s)

    def forget(self, peer_id: PeerId) -> None:
        """Drops what is known of a server that did not answer."""
        self._measured.pop(peer_id, None)

    def nearest(self, now_s: float) -> Mapping[PeerId, float]:
        """The servers that are nearest, with their round trips in seconds."""
        self._measured = {
            peer_id: measured for peer_id, measured in self._measured.items() if now_s - measured.at_s < LIFETIME_S
        }
        found = ((measured.round_trip_s, peer_id) for peer_id, measured in self._measured.items())
        return {peer_id: round_trip_s for round_trip_s, peer_id in heapq.nsmallest(MAX_KEPT, found)}
