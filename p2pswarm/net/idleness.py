"""Which connections nobody needs at the moment, and which one makes room for another. Pure."""

import itertools
from collections.abc import Iterable
from typing import Protocol, TypeVar

from p2pswarm.net.admission import Source, source_of
from p2pswarm.net.path import ConnectionPath

GREEDY_SHARE = 1 / 8
"""Of all connections: who has more from one address makes room first."""


class Held(Protocol):
    """The part of `net.connection.Connection` that is looked at here."""

    @property
    def path(self) -> ConnectionPath: ...

    @property
    def is_closed(self) -> bool: ...

    @property
    def idle_since_s(self) -> float | None: ...


Connection = TypeVar("Connection", bound=Held)


def who_makes_room(connections: Iterable[Connection], newcomer: Source, max_connections: int) -> Connection | None:
    """The one to close for a newcomer.

    Of the address with more than its share, the one idle longest or else the newest; of all others, the one idle
    longest. None where all are in use.
    """
    by_source: dict[Source, list[Connection]] = {newcomer: []}
    for connection in connections:
        if not connection.is_closed:
            by_source.setdefault(source_of(connection.path), []).append(connection)
    greediest = max(by_source.values(), key=len)
    if len(greediest) > max(len(by_source[newcomer]) + 1, GREEDY_SHARE * max_connections):
        return longest_idle(greediest) or greediest[-1]
    return longest_idle(itertools.chain.from_iterable(by_source.values()))


def longest_idle(connections: Iterable[Connection]) -> Connection | None:
    """The one that has been without a stream for longest; None where each has one."""
    idle = [
        (connection.idle_since_s, index, connection)
        for index, connection in enumerate(connections)
        if connection.idle_since_s is not None and not connection.is_closed
    ]
    return min(idle)[2] if idle else None


def idle_since_before(connections: Iterable[Connection], moment_s: float) -> list[Connection]:
    """Those that have been without a stream since before the moment."""
    return [
        connection
        for connection in connections
        if connection.idle_since_s is not None and connection.idle_since_s < moment_s
    ]
