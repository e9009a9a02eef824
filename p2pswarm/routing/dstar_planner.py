"""The planner of clients: one for all sessions of a client with a model, kept up to date by D* Lite.

Servers that join, leave, move, are banned or forgiven, and figures that change, become changes of a few edges in a
graph that is kept; only what such a change reaches is searched again. Requests that see the servers alike share a
graph: what matters is who has room for the session and who takes one that long, not the numbers, so that two lengths
share one as long as no server's limit lies between them.

A request that avoids servers of its own leaves them out as if they were banned, and the next one takes them back in.
Routes are those of a search from scratch (`routing/shortest_path.py`), to the last tie.
"""

from collections.abc import Iterable, Mapping

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.routing.graph import Vertex
from p2pswarm.routing.live_graph import LiveGraph
from p2pswarm.routing.planner import RouteRequest
from p2pswarm.routing.shortest_path import RoutingStatistics, ShortestPathPlanner

MAX_GRAPHS = 4
"""Kept at once; the one not used for longest goes first."""


class DStarLitePlanner(ShortestPathPlanner):
    """A `Planner` that repairs its plans instead of making them anew."""

    _graphs: tuple[LiveGraph, ...] = ()

    def update(self, servers: Iterable[ServerInfo], round_trips_s: Mapping[PeerId, float]) -> None:
        changed = self._known.update(servers, round_trips_s)
        for graph in self._graphs:
            graph.note_changed(changed)

    def statistics(self) -> RoutingStatistics:
        from_scratch = super().statistics()
        searches = [graph.search for graph in self._graphs]
        return RoutingStatistics(
            len(searches),
            from_scratch.num_settled + sum(search.num_expanded for search in searches),
            from_scratch.num_popped + sum(search.num_popped for search in searches),
        )

    def _shortest_path(self, request: RouteRequest, now_s: float) -> tuple[int, list[Vertex]] | None:
        graph = self._graph_for(request)
        return graph.path(request, self._prices(graph.request), self._admission(now_s))

    def _graph_for(self, request: RouteRequest) -> LiveGraph:
        """The graph for requests like this one, a new one if there is none."""
        graph = next((graph for graph in reversed(self._graphs) if graph.serves(request)), None)
        if graph is None:
            graph = LiveGraph(request, self._known)
        others = [other for other in self._graphs if other is not graph]
        self._graphs = (*others, graph)[-MAX_GRAPHS:]
        return graph
