"""Servers' spans as a graph whose shortest path is the fastest route.

Vertices are places where the hidden states of a token can be:

    AtClient(b)      with the client, blocks before `b` done; the start and the goal of every route are such vertices
    AtServer(b, p)   with server `p`, which has just run the block before `b`

Edges, with what they cost; each but the way out runs the blocks of `p` from one boundary `b` to the next, `c`:

    AtClient(b) -> AtServer(c, p)      the way in from the client, for every server that holds block b
    AtServer(b, p) -> AtServer(c, p)   further on the same server
    AtServer(b, q) -> AtServer(c, p)   pushed from server q, if q announces its round trip to p
    AtServer(b, p) -> AtClient(b)      the way out

Servers are changed at boundaries only: where some announced span begins or ends, or the route does. A server may thus
be left before its span ends, where another one's begins; pushes happen where the one's span ends or the other's begins.
Through the client, nothing else could be faster. Where servers push, a block run somewhere only to pass by a better
connected server could be, if the detour were shorter than the way; that is given up for a small graph. There is no way
into a server without running a block, and so no cycle.

Servers whose distance nobody measured push to each other as well; that is assumed to cost what the detour by the client
costs, and so needs no edges of its own: the graph grows with the number of servers, not with its square.

What it costs to finish does not depend on where a route starts, which is what lets a planner with a fixed goal answer
for every start. Weights are `cost in us * TIES`, and 1 for each way into or out of a server: of equally fast routes the
one with fewer hops is shorter, and no way is free.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.routing.route import Hop

TIES = 1 << 18
"""More than any route has ways in and out: a model has at most 2^16 blocks."""


class AtClient(NamedTuple):
    block_index: int


class AtServer(NamedTuple):
    block_index: int
    peer_id: PeerId


Vertex = AtClient | AtServer


Edge = tuple[Vertex, Vertex, int]
"""From where, to where, at what weight."""


class Prices(Protocol):
    """What the ways of a graph cost, in microseconds."""

    def enter_us(self, server: ServerInfo) -> int:
        """From the client to the server, without running a block."""
        ...

    def push_us(self, server: ServerInfo, following: ServerInfo) -> int:
        """From one server to the next, whose distance it announces."""
        ...

    def leave_us(self, server: ServerInfo) -> int:
        """From the server back to the client."""
        ...

    def block_us(self, server: ServerInfo) -> int:
        """Running one block."""
        ...


@dataclass(frozen=True, slots=True)
class SpanGraph:
    """The graph over one set of usable servers, for routes that end at block `goal`."""

    servers: Mapping[PeerId, ServerInfo]
    boundaries: Sequence[int]
    """Ascending, from the lowest block that a route may start at to the goal."""
    prices: Prices
    pushes: bool
    _stretches: dict[PeerId, dict[int, AtServer]] = field(default_factory=dict, init=False)

    def edges(self) -> Iterator[Edge]:
        for server in self.servers.values():
            yield from self.edges_of(server)

    def edges_of(self, server: ServerInfo) -> Iterator[Edge]:
        """The ways into, through and out of the server, and its pushes to others."""
        enter_us, leave_us, block_us = (
            self.prices.enter_us(server),
            self.prices.leave_us(server),
            self.prices.block_us(server),
        )
        reached = None
        for start, there in self._stretches_of(server).items():
            run_us = (there.block_index - start) * block_us
            yield AtClient(start), there, (enter_us + run_us) * TIES + 1
            if reached is not None:
                yield reached, there, run_us * TIES
            yield there, AtClient(there.block_index), leave_us * TIES + 1
            reached = there
        if self.pushes:
            yield from self.pushes_from(server, server.span)

    def pushes_from(self, server: ServerInfo, span: Span) -> Iterator[Edge]:
        """From the server, once it has run blocks of `span`, to those whose distance it announces."""
        for peer_id in server.next_rtts_s:
            following = self.servers.get(peer_id)
            if following is None or not can_push(server, following):
                continue
            push_us, block_us = self.prices.push_us(server, following), self.prices.block_us(following)
            stretches = self._stretches_of(following)
            for start in push_points(span, following.span):
                there = stretches.get(start)
                if there is not None:
                    weight = (push_us + (there.block_index - start) * block_us) * TIES + 1
                    yield AtServer(start, server.peer_id), there, weight

    def _stretches_of(self, server: ServerInfo) -> dict[int, AtServer]:
        """The server's span from boundary to boundary, as far as routes go: where each begins, and its end."""
        stretches = self._stretches.get(server.peer_id)
        if stretches is None:
            first, last = (
                bisect_left(self.boundaries, server.span.start),
                bisect_right(self.boundaries, server.span.end),
            )
            stretches = {start: AtServer(end, server.peer_id) for start, end in pairwise(self.boundaries[first:last])}
            self._stretches[server.peer_id] = stretches
        return stretches


def can_push(server: ServerInfo, following: ServerInfo) -> bool:
    """Whether the one may hand on to the other: it announces how far it is, and computes in the same dtype."""
    return (
        following.peer_id in server.next_rtts_s
        and following.peer_id != server.peer_id
        and following.dtype == server.dtype
    )


def push_points(span: Span, following: Span) -> set[int]:
    """The blocks before which a server that runs `span` hands on to one that holds `following`."""
    return {
        point for point in (span.end, following.start) if span.start < point <= span.end and following.covers(point)
    }


def boundaries_within(edges: Iterable[int], span: Span) -> list[int]:
    """Where routes through `span` may change servers, given where spans begin and end; with its own two ends."""
    return sorted({edge for edge in edges if span.start < edge < span.end} | {span.start, span.end})


class Place(Protocol):
    """A vertex of this graph, or of one that has more kinds of them."""

    @property
    def block_index(self) -> int: ...


def hops_along(path: Sequence[Place]) -> tuple[Hop, ...]:
    """The servers that a path enters at an `AtServer`."""
    hops: list[Hop] = []
    for before, after in pairwise(path):
        if isinstance(after, AtServer):
            start = before.block_index
            if isinstance(before, AtServer) and before.peer_id == after.peer_id:
                start = hops.pop().span.start
            hops.append(Hop(after.peer_id, Span(start, after.block_index)))
    return tuple(hops)
