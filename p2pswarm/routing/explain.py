"""Why a route is what it is: edge by edge what it costs, and for every server beside it why it was left out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.routing.costs import CostParts
from p2pswarm.routing.graph import TIES, AtClient, AtServer, SpanGraph, Vertex, can_push, push_points
from p2pswarm.routing.prices import DecodePrices
from p2pswarm.routing.route import Route
from p2pswarm.routing.search import Graph


class EdgeKind(Enum):
    """What happens on an edge of a route."""

    ENTER = "enter"
    """The client sends to a server."""
    RUN = "run"
    """A server runs blocks."""
    PUSH = "push"
    """A server sends to the next one."""
    LEAVE = "leave"
    """A server sends to the client."""


@dataclass(frozen=True, slots=True)
class RouteEdge:
    """One step on the way of a token."""

    kind: EdgeKind
    source: PeerId | None
    """None: the client, here and below."""
    target: PeerId | None
    parts: CostParts
    """What its cost is made of."""
    span: Span | None = None
    """The blocks that are run, on an edge that runs any."""

    @property
    def cost_us(self) -> int:
        return self.parts.total_us


@dataclass(frozen=True, slots=True)
class TurnedDown:
    """A server that is not in the route."""

    peer_id: PeerId
    span: Span
    why: str
    extra_us: int | None = None
    """How much longer the best route through it would take; None where it could not be used at all."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A route with its reasons."""

    route: Route
    edges: tuple[RouteEdge, ...]
    """In order; their costs add up to the route's."""
    turned_down: tuple[TurnedDown, ...]
    """The usable ones first, best first; then the others, by peer id."""


def edges_along(
    route: Route, servers: Mapping[PeerId, ServerInfo], prices: DecodePrices, pushes: bool
) -> Iterator[RouteEdge]:
    """The edges of the route, with the cheaper way from each server to the next."""
    for before, hop in pairwise((None, *route.hops)):
        assert hop is not None
        server = servers[hop.peer_id]
        entering = RouteEdge(EdgeKind.ENTER, None, hop.peer_id, prices.enter(server))
        if before is None:
            yield entering
        else:
            sender = servers[before.peer_id]
            leaving = _leaving(sender, prices)
            pushing = RouteEdge(EdgeKind.PUSH, before.peer_id, hop.peer_id, prices.push(sender, server))
            is_possible = can_push(sender, server) and hop.span.start in push_points(sender.span, server.span)
            if pushes and is_possible and pushing.cost_us <= leaving.cost_us + entering.cost_us:
                yield pushing
            else:
                yield leaving
                yield entering
        computing = CostParts(compute_us=hop.span.num_blocks * prices.block_us(server))
        yield RouteEdge(EdgeKind.RUN, hop.peer_id, hop.peer_id, computing, hop.span)
    yield _leaving(servers[route.hops[-1].peer_id], prices)


def _leaving(server: ServerInfo, prices: DecodePrices) -> RouteEdge:
    return RouteEdge(EdgeKind.LEAVE, server.peer_id, None, CostParts(network_us=prices.leave_us(server)))


def passed_over(route: Route, graph: SpanGraph) -> list[TurnedDown]:
    """The usable servers that are not in the route, each with the best route through it."""
    every_edge: Graph[Vertex] = Graph(graph.edges())
    start, goal = AtClient(route.span.start), AtClient(route.span.end)
    before, after = every_edge.costs_from(start), every_edge.costs_to(goal)
    through: dict[PeerId, int] = {}
    for vertex in before.keys() & after.keys():
        if isinstance(vertex, AtServer):
            weight = before[vertex] + after[vertex]
            through[vertex.peer_id] = min(weight, through.get(vertex.peer_id, weight))
    chosen = {hop.peer_id for hop in route.hops}
    found = []
    for peer_id, server in graph.servers.items():
        if peer_id in through and peer_id not in chosen:
            extra_us = through[peer_id] // TIES - route.cost_us
            why = f"a route through it takes {extra_us / 1000:.1f} ms more" if extra_us else "another is as fast"
            found.append(TurnedDown(peer_id, server.span, why, extra_us))
        elif peer_id not in chosen:
            found.append(TurnedDown(peer_id, server.span, f"holds no block of {route.span}"))
    return sorted(found, key=lambda one: (one.extra_us is None, one.extra_us or 0, one.peer_id))
