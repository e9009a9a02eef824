"""What a client asks of a planner, and what every planner shares: who may be used, and the error for missing blocks.

A planner knows nothing of networks or clocks: announcements, round trips and the current time are handed in.
`routing/shortest_path.py` is the plain one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from p2pswarm.core.errors import MissingBlocksError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span, uncovered
from p2pswarm.routing.route import Route, short_peer


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What a route is for."""

    span: Span
    """Blocks to run."""
    max_length: int = 0
    """Longest sequence of the session in tokens; 0 where no cache is wanted."""
    batch_size: int = 1
    avoided: frozenset[PeerId] = frozenset()
    """Servers that turned this very request down, or failed it."""

    @property
    def cache_tokens(self) -> int:
        return self.max_length * self.batch_size


class Planner(Protocol):
    """Plans routes over the servers it was last told of."""

    def update(self, servers: Iterable[ServerInfo], round_trips_s: Mapping[PeerId, float]) -> None:
        """Replaces what is known: all servers announced for the model, and the round trips measured from here."""
        ...

    def ban(self, peer_id: PeerId, until_s: float) -> None:
        """Keeps a server out of routes planned before `until_s` (on the clock of `plan`'s `now_s`)."""
        ...

    def plan(self, request: RouteRequest, now_s: float) -> Route:
        """The best route. Raises `MissingBlocksError`, which names the ranges that no usable server holds."""
        ...


@dataclass(frozen=True, slots=True)
class ServerFilter:
    """Which servers the user wants used. By peer id only: anyone may call himself what he likes."""

    allowed: frozenset[PeerId] | None = None
    """Only these; None: any."""
    blocked: frozenset[PeerId] = frozenset()

    def objection(self, server: ServerInfo) -> str | None:
        """Why the server may not be used; None when it may."""
        if self.allowed is not None and server.peer_id not in self.allowed:
            return "not among the allowed servers"
        return "blocked" if server.peer_id in self.blocked else None


def objection(
    server: ServerInfo,
    request: RouteRequest,
    servers: ServerFilter,
    banned_until_s: Mapping[PeerId, float],
    now_s: float,
) -> str | None:
    """Why the server cannot be in the route; None when it can."""
    if server.state is not ServerState.ONLINE:
        return str(server.state.value)
    if banned_until_s.get(server.peer_id, now_s) > now_s:
        return f"banned for {banned_until_s[server.peer_id] - now_s:.0f} s more after a failure"
    if server.peer_id in request.avoided:
        return "failed it or has no room now"
    if 0 < server.max_length < request.max_length:
        return f"takes at most {server.max_length} tokens, {request.max_length} are wanted"
    return servers.objection(server)


def missing_blocks(
    request: RouteRequest, usable: Iterable[ServerInfo], objections: Mapping[PeerId, tuple[ServerInfo, str]]
) -> MissingBlocksError | None:
    """The error that names each block range without a usable server, and who was turned down; None if there is none."""
    gaps = uncovered([server.span for server in usable], request.span)
    if not gaps:
        return None
    message = f"no server for blocks {', '.join(map(str, gaps))} of {request.span}"
    relevant = [
        f"{short_peer(peer_id)} {server.span} ({why})"
        for peer_id, (server, why) in sorted(objections.items())
        if any(server.span.start < gap.end and gap.start < server.span.end for gap in gaps)
    ]
    if relevant:
        message += f"; not usable: {', '.join(relevant)}"
    return MissingBlocksError(message, [(gap.start, gap.end) for gap in gaps])
