"""Servers' spans as a graph whose shortest path is the fastest route.

Vertices are places where the hidden states of a token can be:

    AtClient(b)      with the client, blocks before `b` done; the start and the goal of every route are such vertices
    AtServer(p, b)   with server `p`, blocks before `b` done

Edges, with their costs from `routing/costs.py`:

    AtClient(b) -> AtServer(p, b)      the way in, for every server that holds block b
    AtServer(p, b) -> AtServer(p, c)   run the blocks up to the next boundary c
    AtServer(p, b) -> AtClient(b)      the way out

Only boundaries matter (where some span begins or ends, or the route does): leaving a server anywhere else is never
faster. A server may be left before its span ends where another one's begins. Servers that hand on directly would be
edges `AtServer(p, b) -> AtServer(q, b)`. The costs of finishing do not depend on where a route starts, which is what
lets a planner with a fixed goal answer for every start.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.routing.costs import CostModel


@dataclass(frozen=True, slots=True, order=True)
class AtClient:
    block_index: int


@dataclass(frozen=True, slots=True, order=True)
class AtServer:
    peer_id: PeerId
    block_index: int


Vertex = AtClient | AtServer


@dataclass(frozen=True, slots=True)
class SpanGraph:
    """The graph over one set of usable servers, for routes that end at `goal`."""

    servers: Mapping[PeerId, ServerInfo]
    round_trips_s: Mapping[PeerId, float]
    costs: CostModel
    goal: AtClient
    next_boundary: Mapping[int, int]
    """Each boundary to the next one."""
    cache_tokens_needed: int

    def successors(self, vertex: Vertex) -> Iterator[tuple[Vertex, int]]:
        """Where one edge leads from here, with its cost in microseconds."""
        match vertex:
            case AtClient(block_index):
                if vertex != self.goal:
                    yield from self._ways_in(block_index)
            case AtServer(peer_id, block_index):
                server = self.servers[peer_id]
                yield AtClient(block_index), self.costs.half_round_trip_us(self.round_trips_s.get(peer_id))
                following = self.next_boundary.get(block_index)
                if following is not None and following <= server.span.end:
                    yield AtServer(peer_id, following), (following - block_index) * self.costs.block_us(server)

    def _ways_in(self, block_index: int) -> Iterator[tuple[Vertex, int]]:
        for peer_id, server in self.servers.items():
            if server.span.covers(block_index):
                round_trip_s = self.round_trips_s.get(peer_id)
                yield (
                    AtServer(peer_id, block_index),
                    self.costs.enter_us(server, round_trip_s, self.cache_tokens_needed),
                )


def build_graph(
    servers: Mapping[PeerId, ServerInfo],
    round_trips_s: Mapping[PeerId, float],
    costs: CostModel,
    span: Span,
    cache_tokens_needed: int,
) -> SpanGraph:
    """The graph for routes through `span`."""
    edges_of_spans = {edge for server in servers.values() for edge in (server.span.start, server.span.end)}
    boundaries = sorted({edge for edge in edges_of_spans if span.start < edge < span.end} | {span.start, span.end})
    next_boundary = dict(itertools.pairwise(boundaries))
    return SpanGraph(servers, round_trips_s, costs, AtClient(span.end), next_boundary, cache_tokens_needed)
