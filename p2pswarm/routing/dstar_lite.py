"""D* Lite: cheapest paths to one goal that are kept up to date while edges change. Knows nothing of servers.

S. Koenig, M. Likhachev, "D* Lite", AAAI 2002, the optimized version, for a goal that stays where it is. Each vertex has

    g     the cost to the goal as last settled
    rhs   the cost that its successors give it: min over s' of c(s, s') + g(s')

and is consistent where the two agree. A change of an edge makes its source inconsistent; inconsistent vertices wait in
a queue, cheapest first, and settling one passes the change on to its predecessors. What no change reaches is never
looked at again.

Two things are simpler here than in the paper. The heuristic is 0: one that is right today is wrong once a faster edge
appears, and without it the costs to the goal hold for every start, so one structure answers for all of them (k_m stays
0, and the two parts of a key are the same number). And costs are whole numbers above 0, since the algorithm compares
sums for equality: with fractions it would miss changes.
"""

import heapq
import math
from typing import Generic

from p2pswarm.routing.search import V, descend

Cost = float
"""A whole number (an `int`), or `math.inf` where there is no way."""
HEAP_SLACK = 64
"""The heap is cleared of entries that no longer hold when they are the most of it, and more than these."""


class DStarLite(Generic[V]):
    """A graph with a goal. Edges are set at will; costs and paths are brought up to date when they are asked for."""

    def __init__(self, goal: V) -> None:
        self.goal = goal
        self.num_expanded = 0
        """Vertices settled so far."""
        self.num_popped = 0
        """Entries taken from the queue so far: the same, and those that no longer held by then."""
        self._successors: dict[V, dict[V, int]] = {}
        self._predecessors: dict[V, dict[V, int]] = {}
        self._g: dict[V, int] = {}
        """Infinite where missing, as in `_rhs`."""
        self._rhs: dict[V, int] = {goal: 0}
        self._keys: dict[V, int] = {goal: 0}
        """The queue: every inconsistent vertex, with min(g, rhs)."""
        self._heap: list[tuple[int, V]] = [(0, goal)]
        """The same, in order, and entries that no longer hold."""

    def set_edge(self, source: V, target: V, cost: int | None) -> None:
        """Adds the edge, changes its cost, or takes it away (None)."""
        if cost is not None and cost <= 0:
            raise ValueError(f"the cost of an edge is a whole number above 0, got {cost} from {source} to {target}")
        old_cost = self._successors.get(source, {}).get(target)
        if old_cost == cost:
            return
        if cost is None:
            _remove(self._successors, source, target)
            _remove(self._predecessors, target, source)
        else:
            self._successors.setdefault(source, {})[target] = cost
            self._predecessors.setdefault(target, {})[source] = cost
        through_target = self._g.get(target)
        if source != self.goal and through_target is not None:
            self._edge_changed(source, old_cost, cost, through_target)
        if cost is None:
            self._forget_if_alone(source)
            self._forget_if_alone(target)

    def cost(self, start: V) -> int | None:
        """What it costs to get from `start` to the goal; None where there is no way."""
        self._settle(start)
        return self._rhs.get(start)

    def path(self, start: V) -> list[V] | None:
        """The cheapest way from `start` to the goal, ties going to the lowest vertex; None where there is none."""
        if self.cost(start) is None:
            return None
        return descend(start, self.goal, self._successors.__getitem__, self._g)

    def _edge_changed(self, source: V, old_cost: int | None, cost: int | None, through_target: int) -> None:
        """Brings the rhs of the edge's source up to date."""
        rhs = self._rhs.get(source, math.inf)
        if cost is not None and (old_cost is None or cost < old_cost):
            if cost + through_target < rhs:
                self._set_rhs(source, cost + through_target)
        elif old_cost is not None and old_cost + through_target == rhs:
            self._set_rhs(source, self._lookahead(source))

    def _forget_if_alone(self, vertex: V) -> None:
        """Nothing is kept of a vertex without edges, so that vertices may come and go for ever."""
        if vertex != self.goal and vertex not in self._successors and vertex not in self._predecessors:
            for facts in (self._g, self._rhs, self._keys):
                facts.pop(vertex, None)

    def _settle(self, start: V) -> None:
        """The paper's ComputeShortestPath."""
        while self._has_entry_below(self._key(start)) or self._is_too_cheap(start):
            _, vertex = heapq.heappop(self._heap)
            self.num_popped += 1
            self.num_expanded += 1
            del self._keys[vertex]
            if self._is_too_cheap(vertex):
                self._give_up(vertex)
            else:
                self._improve(vertex)

    def _has_entry_below(self, key: Cost) -> bool:
        """Whether the queue begins with a lower key; its entries that no longer hold are dropped on the way."""
        while self._heap and self._keys.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
            self.num_popped += 1
        return bool(self._heap) and self._heap[0][0] < key

    def _is_too_cheap(self, vertex: V) -> bool:
        """Whether its successors have become dearer than it was settled at."""
        return self._g.get(vertex, math.inf) < self._rhs.get(vertex, math.inf)

    def _improve(self, vertex: V) -> None:
        """Settles a vertex that has become cheaper, and with it, perhaps, its predecessors."""
        cost = self._g[vertex] = self._rhs[vertex]
        for before, edge in self._predecessors.get(vertex, {}).items():
            through = edge + cost
            if through < self._rhs.get(before, math.inf):  # never for the goal, whose rhs is 0
                self._set_rhs(before, through)

    def _give_up(self, vertex: V) -> None:
        """Makes the cost of a vertex infinite until it is settled again; those that relied on it look round anew."""
        old_cost = self._g.pop(vertex)
        for before, edge in self._predecessors.get(vertex, {}).items():
            if before != self.goal and self._rhs.get(before) == edge + old_cost:
                self._set_rhs(before, self._lookahead(before))
        self._update(vertex)

    def _lookahead(self, vertex: V) -> Cost:
        """What the successors as they are now make it cost."""
        g = self._g
        after = self._successors.get(vertex, {})
        return min((edge + g[target] for target, edge in after.items() if target in g), default=math.inf)

    def _set_rhs(self, vertex: V, cost: Cost) -> None:
        if cost == math.inf:
            self._rhs.pop(vertex, None)
        else:
            self._rhs[vertex] = int(cost)
        self._update(vertex)

    def _update(self, vertex: V) -> None:
        """The paper's UpdateVertex: in the queue, with its key, if it is inconsistent, and only then."""
        g, rhs = self._g.get(vertex), self._rhs.get(vertex)
        if g == rhs:
            self._keys.pop(vertex, None)
            return
        key = min(one for one in (g, rhs) if one is not None)
        if self._keys.get(vertex) != key:
            self._keys[vertex] = key
            heapq.heappush(self._heap, (key, vertex))
            if len(self._heap) > 2 * len(self._keys) + HEAP_SLACK:
                self._heap = [(key, vertex) for vertex, key in self._keys.items()]
                heapq.heapify(self._heap)

    def _key(self, vertex: V) -> Cost:
        return min(self._g.get(vertex, math.inf), self._rhs.get(vertex, math.inf))


def _remove(edges: dict[V, dict[V, int]], one: V, other: V) -> None:
    """Takes an edge out, and the vertex with it that has no other."""
    del edges[one][other]
    if not edges[one]:
        del edges[one]
