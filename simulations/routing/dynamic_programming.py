"""The third way to the fastest route: since hidden states only go forward, one pass over the blocks from the last to
the first, without a queue and without making a graph. For comparison; nothing else uses it."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from math import inf

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.routing.graph import TIES, AtClient, AtServer, SpanGraph, Vertex, can_push, push_points
from p2pswarm.routing.planner import RouteRequest
from p2pswarm.routing.shortest_path import ShortestPathPlanner

CLIENT = PeerId("")


class DynamicProgrammingPlanner(ShortestPathPlanner):
    """A planner that knows what the others know."""

    def _shortest_path(self, request: RouteRequest, now_s: float) -> tuple[int, list[Vertex]] | None:
        usable, _ = self._admission(now_s).divide(self._known.servers.values(), request)
        table = Table(self._graph(usable, request))
        self._num_popped += table.num_places
        return table.path()


class Table:
    """For each boundary and each server that may have run the stretch before it: the time to finish, who is next."""

    def __init__(self, graph: SpanGraph) -> None:
        self._graph = graph
        self._following: list[dict[PeerId, PeerId]] = [{} for _ in graph.boundaries]
        self._entered: list[PeerId] = [CLIENT for _ in graph.boundaries]
        self.cost_us: float = 0
        self.num_places = 0
        self._fill()

    def _fill(self) -> None:
        servers, prices, boundaries = self._graph.servers, self._graph.prices, self._graph.boundaries
        enter_us = {peer_id: prices.enter_us(server) for peer_id, server in servers.items()}
        leave_us = {peer_id: prices.leave_us(server) for peer_id, server in servers.items()}
        block_us = {peer_id: prices.block_us(server) for peer_id, server in servers.items()}
        pushes_us = {peer_id: self._pushes_us(server) for peer_id, server in servers.items()}
        ending = self._ending_at()
        running_us: dict[PeerId, float] = {}
        for index in range(len(boundaries) - 1, 0, -1):
            num_blocks = boundaries[index] - boundaries[index - 1]
            before_us: dict[PeerId, float] = {}
            for peer_id in ending[index]:
                best_us, following = leave_us[peer_id] + self.cost_us, CLIENT
                for other, push_us in (*pushes_us[peer_id].get(boundaries[index], ()), (peer_id, 0)):
                    other_us = push_us + running_us.get(other, inf)
                    if other_us < best_us:
                        best_us, following = other_us, other
                self._following[index][peer_id] = following
                before_us[peer_id] = num_blocks * block_us[peer_id] + best_us
            running_us = before_us
            ways = ((enter_us[peer_id] + time_us, peer_id) for peer_id, time_us in running_us.items())
            self.cost_us, self._entered[index - 1] = min(ways, default=(inf, CLIENT))
            self.num_places += len(running_us) + 1

    def _pushes_us(self, server: ServerInfo) -> dict[int, list[tuple[PeerId, int]]]:
        """By boundary: whom the server can hand on to there."""
        pushes_us: defaultdict[int, list[tuple[PeerId, int]]] = defaultdict(list)
        for peer_id in server.next_rtts_s:
            other = self._graph.servers.get(peer_id)
            if other is not None and can_push(server, other):
                push_us = self._graph.prices.push_us(server, other)
                for point in push_points(server.span, other.span):
                    pushes_us[point].append((peer_id, push_us))
        return pushes_us

    def _ending_at(self) -> list[list[PeerId]]:
        boundaries = self._graph.boundaries
        ending: list[list[PeerId]] = [[] for _ in boundaries]
        for peer_id, server in self._graph.servers.items():
            first, last = bisect_left(boundaries, server.span.start), bisect_right(boundaries, server.span.end)
            for index in range(first + 1, last):
                ending[index].append(peer_id)
        return ending

    def path(self) -> tuple[int, list[Vertex]] | None:
        """The way through the table."""
        if self.cost_us == inf:
            return None
        boundaries = self._graph.boundaries
        path: list[Vertex] = [AtClient(boundaries[0])]
        at = CLIENT
        for index in range(len(boundaries) - 1):
            at = at or self._entered[index]
            path.append(AtServer(boundaries[index + 1], at))
            at = self._following[index + 1][at]
            if at == CLIENT:
                path.append(AtClient(boundaries[index + 1]))
        return int(self.cost_us) * TIES, path
