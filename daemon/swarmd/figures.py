"""What changes about a server while it runs, and when the swarm should hear of it: room, waiting, neighbours, line."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo

CACHE_DEAD_BAND = 0.25
"""Of the whole cache: how far the room may move before the announcement is corrected."""
SPEED_DEAD_BAND = 0.2
TIME_DEAD_BAND = 0.2
"""Of a waiting time or round trip: how far it may move. Less is noise, or no reason to take another way."""
SHORTEST_CHANGE_S = 0.002
"""As much as a hop costs anyway: smaller changes decide nothing."""


class Room(Protocol):
    """`swarmd/memory.py`'s pages."""

    @property
    def total_tokens(self) -> int: ...

    @property
    def tokens_left(self) -> int: ...


class Waiting(Protocol):
    """`swarmd/scheduling/dispatcher.py`'s queue."""

    @property
    def queue_delay_s(self) -> float: ...


class Neighbours(Protocol):
    """`swarmd/pings.py`'s measurements."""

    @property
    def round_trips_s(self) -> Mapping[PeerId, float]: ...


AtSpeed = Callable[[ServerInfo], ServerInfo]
"""The announcement with the speeds that are known now: those of the line are measured while requests are answered."""


class Figures:
    """The figures as they are now."""

    def __init__(self, room: Room, waiting: Waiting, neighbours: Neighbours, at_speed: AtSpeed) -> None:
        self._at_speed = at_speed
        self._room = room
        self._waiting = waiting
        self._neighbours = neighbours

    def updated(self, info: ServerInfo) -> ServerInfo:
        """The announcement with today's figures."""
        return replace(
            self._at_speed(info),
            cache_tokens_left=self._room.tokens_left,
            queue_delay_s=self._waiting.queue_delay_s,
            next_rtts_s=self._neighbours.round_trips_s,
        )

    def correction(self, announced: ServerInfo) -> ServerInfo | None:
        """What to announce instead; None while clients would choose the same."""
        now = self.updated(announced)
        is_wrong = (
            has_room_moved(announced.cache_tokens_left, now.cache_tokens_left, self._room.total_tokens)
            or has_speed_moved(announced.throughput_tokens_per_s, now.throughput_tokens_per_s)
            or has_speed_moved(announced.network_tokens_per_s, now.network_tokens_per_s)
            or has_time_moved(announced.queue_delay_s, now.queue_delay_s)
            or have_round_trips_moved(announced.next_rtts_s, now.next_rtts_s)
        )
        return now if is_wrong else None


def has_room_moved(announced_tokens_left: int, tokens_left: int, total_tokens: int) -> bool:
    """Whether by a quarter of the cache, or to or from none."""
    if (announced_tokens_left == 0) != (tokens_left == 0):
        return True
    return abs(announced_tokens_left - tokens_left) > CACHE_DEAD_BAND * total_tokens


def has_speed_moved(announced_per_s: float, now_per_s: float) -> bool:
    """Whether by a fifth."""
    return abs(announced_per_s - now_per_s) > SPEED_DEAD_BAND * max(announced_per_s, now_per_s)


def has_time_moved(announced_s: float, now_s: float) -> bool:
    """Whether by more than both dead bands."""
    return abs(announced_s - now_s) > max(SHORTEST_CHANGE_S, TIME_DEAD_BAND * max(announced_s, now_s))


def have_round_trips_moved(announced_s: Mapping[PeerId, float], now_s: Mapping[PeerId, float]) -> bool:
    """Whether servers came or went, or one has moved."""
    return announced_s.keys() != now_s.keys() or any(
        has_time_moved(announced_s[peer_id], round_trip_s) for peer_id, round_trip_s in now_s.items()
    )
