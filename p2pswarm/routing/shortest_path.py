"""The plain planner: Dijkstra from scratch for every route.

Ties go to fewer hops, then to the lowest peer ids, so that equal knowledge gives equal routes.
"""

import heapq
from collections.abc import Iterable, Mapping

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.routing.costs import CostModel
from p2pswarm.routing.graph import AtClient, AtServer, SpanGraph, Vertex, build_graph
from p2pswarm.routing.planner import RouteRequest, ServerFilter, missing_blocks, objection
from p2pswarm.routing.route import Hop, Route

Entries = tuple[tuple[PeerId, int], ...]
"""The servers entered so far, each with the block it was entered at."""


class ShortestPathPlanner:
    """A `Planner` that searches the whole graph each time."""

    def __init__(self, costs: CostModel | None = None, servers: ServerFilter | None = None) -> None:
        self._costs = costs or CostModel()
        self._filter = servers or ServerFilter()
        self._servers: dict[PeerId, ServerInfo] = {}
        self._round_trips_s: dict[PeerId, float] = {}
        self._banned_until_s: dict[PeerId, float] = {}

    def update(self, servers: Iterable[ServerInfo], round_trips_s: Mapping[PeerId, float]) -> None:
        self._servers = {server.peer_id: server for server in servers}
        self._round_trips_s = dict(round_trips_s)

    def ban(self, peer_id: PeerId, until_s: float) -> None:
        self._banned_until_s[peer_id] = max(until_s, self._banned_until_s.get(peer_id, until_s))

    def plan(self, request: RouteRequest, now_s: float) -> Route:
        self._banned_until_s = {peer_id: until for peer_id, until in self._banned_until_s.items() if until > now_s}
        usable: dict[PeerId, ServerInfo] = {}
        objections: dict[PeerId, tuple[ServerInfo, str]] = {}
        for peer_id, server in self._servers.items():
            why = objection(server, request, self._filter, self._banned_until_s, now_s)
            if why is None:
                usable[peer_id] = server
            else:
                objections[peer_id] = (server, why)
        error = missing_blocks(request, usable.values(), objections)
        if error is not None:
            raise error
        graph = build_graph(usable, self._round_trips_s, self._costs, request.span, request.cache_tokens)
        return shortest_route(graph, request.span)


def shortest_route(graph: SpanGraph, span: Span) -> Route:
    """The cheapest way from the client at `span.start` to the client at `span.end`; every block must be covered."""
    start: Vertex = AtClient(span.start)
    queue: list[tuple[int, int, Entries, int, int, Vertex]] = [(0, 0, (), span.start, 0, start)]
    settled: set[Vertex] = set()
    pushed = 0
    while queue:
        cost_us, num_hops, entries, _, _, vertex = heapq.heappop(queue)
        if vertex == graph.goal:
            return Route(_hops(entries, span.end), cost_us)
        if vertex in settled:
            continue
        settled.add(vertex)
        for following, edge_us in graph.successors(vertex):
            if following in settled:
                continue
            hops_after, entries_after = num_hops, entries
            if isinstance(vertex, AtClient) and isinstance(following, AtServer):
                hops_after, entries_after = num_hops + 1, (*entries, (following.peer_id, following.block_index))
            pushed += 1
            heapq.heappush(
                queue, (cost_us + edge_us, hops_after, entries_after, following.block_index, pushed, following)
            )
    raise AssertionError(f"blocks {span} are covered, yet no path was found")


def _hops(entries: Entries, end: int) -> tuple[Hop, ...]:
    starts = [block_index for _, block_index in entries]
    return tuple(
        Hop(peer_id, Span(block_start, block_end))
        for (peer_id, block_start), block_end in zip(entries, [*starts[1:], end], strict=True)
    )
