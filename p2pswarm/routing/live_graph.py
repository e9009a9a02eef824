"""The routing graph kept for many requests, inside D* Lite: what changes about servers becomes changes of edges."""

from collections.abc import Iterable

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.routing.dstar_lite import DStarLite
from p2pswarm.routing.graph import AtClient, SpanGraph, Vertex, boundaries_within
from p2pswarm.routing.known_servers import KnownServers
from p2pswarm.routing.objections import Admission
from p2pswarm.routing.planner import RouteRequest
from p2pswarm.routing.prices import DecodePrices

EdgeCosts = dict[tuple[Vertex, Vertex], int]


class LiveGraph:
    """One graph for all requests that end at one block and see every server alike, wherever they start."""

    def __init__(self, request: RouteRequest, known: KnownServers) -> None:
        self.request = request
        """Stands for all of them, whoever they avoid."""
        self.search: DStarLite[Vertex] = DStarLite(AtClient(request.span.end))
        self._known = known
        self._changed: set[PeerId] = set(known.servers)
        self._left_out: frozenset[PeerId] = frozenset()
        """Servers that were banned, or avoided by the request, when a route was last asked for."""
        self._usable: dict[PeerId, ServerInfo] = {}
        self._boundaries: list[int] = []
        self._edges: dict[PeerId, EdgeCosts] = {}
        """What is in the search, by the server that an edge leads through or out of."""

    def serves(self, request: RouteRequest) -> bool:
        """Whether the request's routes are this graph's."""
        ours = self.request
        if (request.span.end, request.pushes, request.adapter) != (ours.span.end, ours.pushes, ours.adapter):
            return False
        if (request.max_length, request.cache_tokens) == (ours.max_length, ours.cache_tokens):
            return True
        return all(
            (request.cache_tokens > server.cache_tokens_left) == (ours.cache_tokens > server.cache_tokens_left)
            and (0 < server.max_length < request.max_length) == (0 < server.max_length < ours.max_length)
            for server in self._known.servers.values()
        )

    def note_changed(self, peer_ids: Iterable[PeerId]) -> None:
        """These servers are no longer as they were; looked at when a route is next asked for."""
        self._changed.update(peer_ids)

    def path(
        self, request: RouteRequest, prices: DecodePrices, admission: Admission
    ) -> tuple[int, list[Vertex]] | None:
        """The weight and the vertices of the cheapest path for a request that the graph serves; None: no path."""
        self._take_changes(request, prices, admission)
        path = self.search.path(AtClient(request.span.start))
        if path is None:
            return None
        weight = self.search.cost(path[0])
        assert weight is not None
        return weight, path

    def _take_changes(self, request: RouteRequest, prices: DecodePrices, admission: Admission) -> None:
        """Sets the edges that are no longer as they were."""
        left_out = request.avoided.union(admission.banned)
        changed = self._changed | (left_out ^ self._left_out)
        self._changed, self._left_out = set(), left_out
        for peer_id in changed:
            server = self._known.servers.get(peer_id)
            if server is not None and admission.objection(server, request) is None:
                self._usable[peer_id] = server
            else:
                self._usable.pop(peer_id, None)
        changed |= self._take_boundaries(request.span.start)
        for peer_id in list(changed):
            changed |= self._known.announcers.get(peer_id, set())
        graph = SpanGraph(self._usable, self._boundaries, prices, self.request.pushes)
        for peer_id in changed:
            usable = self._usable.get(peer_id)
            edges = () if usable is None else graph.edges_of(usable)
            self._replace(peer_id, {(source, target): weight for source, target, weight in edges})

    def _take_boundaries(self, start: int) -> set[PeerId]:
        """Brings the boundaries up to date; returns the servers that lie across one that came or went."""
        whole = Span(0, self.request.span.end)
        boundaries = boundaries_within([*self._known.span_edges, start], whole)
        if boundaries == self._boundaries:
            return set()
        moved = set(boundaries) ^ set(self._boundaries)
        self._boundaries = boundaries
        return {
            peer_id
            for peer_id, server in self._usable.items()
            if any(server.span.start < edge < server.span.end for edge in moved)
        }

    def _replace(self, peer_id: PeerId, edges: EdgeCosts) -> None:
        before = self._edges.pop(peer_id, {})
        if edges:
            self._edges[peer_id] = edges
        for edge in before.keys() - edges.keys():
            self.search.set_edge(*edge, None)
        for edge, weight in edges.items():
            if before.get(edge) != weight:
                self.search.set_edge(*edge, weight)
