"""What routing goes by: the announced servers and the measured round trips, without their noise.

A figure that moved by less than a dead band counts as it was, so that measurements which differ a little each time do
not change routes, nor make a planner work. Slow drift is not lost: figures are compared with the one that counts, not
with the last one.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo

DEAD_BAND = 0.15
"""Part of a figure; pings over the Internet vary by 10 %."""
SMALLEST_CHANGE_S = 0.001
"""Times that differ by less are the same: on one machine, round trips double and halve all the time."""


class KnownServers:
    """Told of everything again and again; says what has changed."""

    def __init__(self) -> None:
        self.servers: dict[PeerId, ServerInfo] = {}
        self.round_trips_s: dict[PeerId, float] = {}
        self.span_edges: Counter[int] = Counter()
        """Where spans begin and end, and how many of them do."""
        self.announcers: defaultdict[PeerId, set[PeerId]] = defaultdict(set)
        """Who announces how far away a peer is."""
        self._announced: dict[PeerId, ServerInfo] = {}
        """The servers as they were announced, noise and all."""

    def update(self, servers: Iterable[ServerInfo], round_trips_s: Mapping[PeerId, float]) -> set[PeerId]:
        """Takes in all that is known now; returns the servers that joined, left or changed."""
        announced = {server.peer_id: server for server in servers}
        changed = self._update_round_trips(round_trips_s)
        for peer_id in self.servers.keys() - announced.keys():
            self._set(peer_id, None)
            changed.add(peer_id)
        for peer_id, server in announced.items():
            if server is self._announced.get(peer_id):
                continue
            before = self.servers.get(peer_id)
            now = server if before is None else _steadied(before, server)
            if now != before:
                self._set(peer_id, now)
                changed.add(peer_id)
        self._announced = announced
        return changed

    def _update_round_trips(self, round_trips_s: Mapping[PeerId, float]) -> set[PeerId]:
        changed = self.round_trips_s.keys() - round_trips_s.keys()
        for peer_id in changed:
            del self.round_trips_s[peer_id]
        for peer_id, now_s in round_trips_s.items():
            before_s = self.round_trips_s.get(peer_id)
            if before_s is None or not _is_about(now_s, before_s, SMALLEST_CHANGE_S):
                self.round_trips_s[peer_id] = now_s
                changed.add(peer_id)
        return changed

    def _set(self, peer_id: PeerId, server: ServerInfo | None) -> None:
        before = self.servers.pop(peer_id, None)
        if before is not None:
            self.span_edges -= Counter((before.span.start, before.span.end))
            for other in before.next_rtts_s:
                self.announcers[other].discard(peer_id)
                if not self.announcers[other]:
                    del self.announcers[other]
        if server is not None:
            self.servers[peer_id] = server
            self.span_edges.update((server.span.start, server.span.end))
            for other in server.next_rtts_s:
                self.announcers[other].add(peer_id)


def _steadied(before: ServerInfo, now: ServerInfo) -> ServerInfo:
    """The announcement, with figures that hardly moved as they were."""
    return replace(
        now,
        inference_tokens_per_s=_steady(before.inference_tokens_per_s, now.inference_tokens_per_s, 0.0),
        queue_delay_s=_steady(before.queue_delay_s, now.queue_delay_s, SMALLEST_CHANGE_S),
        next_rtts_s={
            peer_id: _steady(before.next_rtts_s.get(peer_id, rtt_s), rtt_s, SMALLEST_CHANGE_S)
            for peer_id, rtt_s in now.next_rtts_s.items()
        },
    )


def _steady(before: float, now: float, smallest: float) -> float:
    return before if _is_about(now, before, smallest) else now


def _is_about(now: float, before: float, smallest: float) -> bool:
    return now == before or abs(now - before) <= max(smallest, DEAD_BAND * abs(before))
