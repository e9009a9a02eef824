"""The planner of clients: one for all sessions of a client with a model, kept up to date by D* Lite.

Servers that join, leave, move, are banned or forgiven, and figures that change, become changes of a few edges in a
graph that is kept; only what such a change reaches is searched again. Requests that see the servers alike share a
graph: what matters is who has room for the session and who takes one that long, not the numbers, so that two lengths
share one as long as no server's limit lies between them.

Requests that avoid servers of their own are rare and each different: they are searched from scratch, as all are by
`routing/shortest_path.py`. Routes are the same either way.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.routing.graph import Vertex
from p2pswarm.routing.live_graph import LiveGraph
from p2pswarm.routing.planner import RouteRequest
from p2pswarm.routing.shortest_path import ShortestPathPlanner

MAX_GRAPHS = 8
"""Kept at once; the one not used for longest goes first."""


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """The work of the graphs that are kept now."""

    num_graphs: int
    num_expanded: int
    """Vertices settled, since each graph was made."""
    num_popped: int
    """Entries taken from queues; those that no longer held count too."""


class DStarLitePlanner(ShortestPathPlanner):
    """A `Planner` that repairs its plans instead of making them anew."""

    _graphs: tuple[LiveGraph, ...] = ()

    def update(self, servers: Iterable[ServerInfo], round_trips_s: Mapping[PeerId, float]) -> None:
        changed = self._known.update(servers, round_trips_s)
        for graph in self._graphs:
            graph.note_changed(changed)

    def statistics(self) -> RoutingStatistics:
        searches = [graph.search for graph in self._graphs]
        return RoutingStatistics(
            len(searches),
            sum(search.num_expanded for search in searches),
            sum(search.num_popped for search in searches),
        )

    def _shortest_path(self, request: RouteRequest, now_s: float) -> tuple[int, list[Vertex]] | None:
        if request.avoided:
            return super()._shortest_path(request, now_s)
        graph = self._graph_for(request)
        return graph.path(request.span.start, self._prices(graph.request), self._admission(now_s))

    def _graph_for(self, request: RouteRequest) -> LiveGraph:
        """The graph for requests like this one, a new one if there is none."""
        graph = next((graph for graph in reversed(self._graphs) if graph.serves(request)), None)
        if graph is None:
            graph = LiveGraph(request, self._known)
        others = [other for other in self._graphs if other is not graph]
        self._graphs = (*others, graph)[-MAX_GRAPHS:]
        return graph
