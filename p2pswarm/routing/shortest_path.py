"""The plain planner: the whole graph is made and searched anew for every route.

The same facts give the same route: ties go to fewer hops, then to the lowest peer ids.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from random import Random, SystemRandom

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import Ban, BanList, BanReason
from p2pswarm.routing.costs import CostModel
from p2pswarm.routing.explain import Explanation, TurnedDown, edges_along, passed_over
from p2pswarm.routing.graph import TIES, AtClient, SpanGraph, Vertex, boundaries_within, hops_along
from p2pswarm.routing.known_servers import KnownServers
from p2pswarm.routing.objections import Admission, missing_blocks
from p2pswarm.routing.planner import RepairRequest, RouteMode, RouteRequest, ServerFilter
from p2pswarm.routing.prices import DecodePrices
from p2pswarm.routing.repair import Repair
from p2pswarm.routing.route import Route
from p2pswarm.routing.search import Graph
from p2pswarm.routing.spread import spread_hops


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """The work of a planner: in searches from scratch, and in the graphs that it keeps now."""

    num_graphs: int
    num_settled: int
    """Vertices whose cost was found."""
    num_popped: int
    """Entries taken from queues; those that no longer held count too."""


class ShortestPathPlanner:
    """A `Planner` that searches the whole graph each time."""

    def __init__(
        self,
        costs: CostModel | None = None,
        servers: ServerFilter | None = None,
        bans: BanList | None = None,
        random: Random | None = None,
    ) -> None:
        self._costs = costs or CostModel()
        self._filter = servers or ServerFilter()
        self._bans = bans or BanList()
        self._random = random or SystemRandom()
        self._known = KnownServers()
        self._num_settled = 0
        self._num_popped = 0

    def update(self, servers: Iterable[ServerInfo], round_trips_s: Mapping[PeerId, float]) -> None:
        self._known.update(servers, round_trips_s)

    def ban(self, peer_id: PeerId, now_s: float, reason: BanReason) -> None:
        self._bans.add(peer_id, now_s, reason)

    def forgive(self, peer_id: PeerId) -> None:
        self._bans.forgive(peer_id)

    def banned(self, now_s: float) -> Mapping[PeerId, Ban]:
        return self._bans.active(now_s)

    def plan(self, request: RouteRequest, now_s: float) -> Route:
        if request.mode is RouteMode.MAX_THROUGHPUT:
            usable = self._usable(request, request.span, now_s)
            return Route(spread_hops(request.span, list(usable.values()), self._random))
        found = self._shortest_path(request, now_s)
        if found is None:
            self._usable(request, request.span, now_s)
            raise AssertionError(f"blocks {request.span} are covered, yet no path was found")
        weight, path = found
        return Route(hops_along(path), weight // TIES)

    def explain(self, request: RouteRequest, now_s: float) -> Explanation:
        """The fastest route, and why it is that one. Raises as `plan` does."""
        route = self.plan(replace(request, mode=RouteMode.MIN_LATENCY), now_s)
        usable, objections = self._admission(now_s).divide(self._known.servers.values(), request)
        graph = self._graph(usable, request)
        edges = edges_along(route, usable, self._prices(request), request.pushes)
        unusable = [
            TurnedDown(peer_id, self._known.servers[peer_id].span, why) for peer_id, why in sorted(objections.items())
        ]
        return Explanation(route, tuple(edges), (*passed_over(route, graph), *unusable))

    def repair(self, request: RepairRequest, now_s: float) -> Route:
        usable = self._usable(request.request, request.request.span, now_s)
        return Repair(request, usable, self._known, self._prices(request.request)).route()

    def statistics(self) -> RoutingStatistics:
        return RoutingStatistics(0, self._num_settled, self._num_popped)

    def _shortest_path(self, request: RouteRequest, now_s: float) -> tuple[int, list[Vertex]] | None:
        """The weight and the vertices of the cheapest path through the request's blocks; None where there is none."""
        usable, _ = self._admission(now_s).divide(self._known.servers.values(), request)
        graph: Graph[Vertex] = Graph(self._graph(usable, request).edges())
        found = graph.shortest_path(AtClient(request.span.start), AtClient(request.span.end))
        self._num_settled += graph.num_settled
        self._num_popped += graph.num_popped
        return found

    def _graph(self, usable: Mapping[PeerId, ServerInfo], request: RouteRequest) -> SpanGraph:
        boundaries = boundaries_within(self._known.span_edges, request.span)
        return SpanGraph(usable, boundaries, self._prices(request), request.pushes)

    def _usable(self, request: RouteRequest, wanted: Span, now_s: float) -> dict[PeerId, ServerInfo]:
        """The servers that may be in the route. Raises `MissingBlocksError` unless they hold all wanted blocks."""
        usable, objections = self._admission(now_s).divide(self._known.servers.values(), request)
        error = missing_blocks(wanted, (one.span for one in usable.values()), self._known.servers, objections)
        if error is not None:
            raise error
        return usable

    def _admission(self, now_s: float) -> Admission:
        return Admission(self._filter, self._bans.active(now_s), now_s)

    def _prices(self, request: RouteRequest) -> DecodePrices:
        return DecodePrices(self._costs, self._known.round_trips_s, request.cache_tokens)
