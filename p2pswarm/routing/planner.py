"""What a client asks of a planner: routes through all blocks, repairs after a failure, bans.

A planner knows nothing of networks or clocks: announcements, round trips and the current time are handed in.
`routing/dstar_planner.py` is the one that clients use, `routing/shortest_path.py` the plain one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import Ban, BanReason
from p2pswarm.routing.route import Hop, Route


class RouteMode(Enum):
    """What a route is to be good at."""

    MIN_LATENCY = "min_latency"
    """The fastest decode step: for generation."""
    MAX_THROUGHPUT = "max_throughput"
    """Another route each time, by the servers' capacity: for training and parallel forward passes."""


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
    mode: RouteMode = RouteMode.MIN_LATENCY
    pushes: bool = True
    """Whether servers may hand on to each other, not through the client only."""
    adapter: str | None = None
    """Only servers that announce this one."""

    @property
    def cache_tokens(self) -> int:
        return self.max_length * self.batch_size


@dataclass(frozen=True, slots=True)
class RepairRequest:
    """What is wanted after servers in the middle of a route were lost."""

    request: RouteRequest
    """Its span is the lost blocks."""
    kept: tuple[Hop, ...]
    """The hops after the lost blocks, whose sessions are open and hold the history."""
    position: int
    """Tokens of history that a new server has to be sent and to run."""
    remaining_tokens: int
    """Decode steps that the session is expected to make yet: what a faster route is worth."""

    def __post_init__(self) -> None:
        reached = self.request.span.end
        for hop in self.kept:
            if hop.span.start != reached:
                raise ConfigError(f"the kept hops go on at block {reached} without a gap, got {hop}")
            reached = hop.span.end

    @property
    def span(self) -> Span:
        """All the blocks that may be routed anew."""
        return Span(self.request.span.start, self.kept[-1].span.end if self.kept else self.request.span.end)


class Planner(Protocol):
    """Plans routes over the servers it was last told of. All `now_s` are on one clock, the caller's."""

    def update(self, servers: Iterable[ServerInfo], round_trips_s: Mapping[PeerId, float]) -> None:
        """Replaces what is known: all servers announced for the model, and the round trips measured from here.

        Figures that moved only a little count as they were, so that noise does not change routes.
        """
        ...

    def ban(self, peer_id: PeerId, now_s: float, reason: BanReason) -> None:
        """Keeps a server out of new routes for a while, longer each time."""
        ...

    def forgive(self, peer_id: PeerId) -> None:
        """Ends a server's ban, and forgets that there was one."""
        ...

    def banned(self, now_s: float) -> Mapping[PeerId, Ban]:
        """Who is banned now."""
        ...

    def plan(self, request: RouteRequest, now_s: float) -> Route:
        """The best route. Raises `MissingBlocksError`, which names the ranges that no usable server holds."""
        ...

    def repair(self, request: RepairRequest, now_s: float) -> Route:
        """The best hops from the first lost block to the end of the kept hops; kept hops that stay are unchanged.

        Replacing the lost blocks alone is compared with routing the rest anew; servers that are not in the session yet
        are charged what it takes to bring them up to its position. Raises `MissingBlocksError` as `plan` does.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServerFilter:
    """Which servers the user wants used. By peer id, not by name: anyone may call himself what he likes."""

    allowed: frozenset[PeerId] | None = None
    """Only these; None: any."""
    blocked: frozenset[PeerId] = frozenset()
    quantization: frozenset[Quantization] | None = None
    """Only servers whose weights are held so; None: in any way."""

    def objection(self, server: ServerInfo) -> str | None:
        """Why the server may not be used; None when it may."""
        if self.allowed is not None and server.peer_id not in self.allowed:
            return "not among the allowed servers"
        if server.peer_id in self.blocked:
            return "blocked"
        if self.quantization is not None and server.quantization not in {kind.value for kind in self.quantization}:
            return f"its weights are held as {server.quantization}"
        return None
