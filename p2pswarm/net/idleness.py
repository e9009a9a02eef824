"""Which connections nobody needs at the moment. Pure."""

from collections.abc import Iterable

from p2pswarm.net.connection import Connection


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
