"""The plain way to the shortest path: Dijkstra from scratch, backwards from the goal.

Knows nothing of servers. Ties are broken by the order of the vertices, so that equal graphs give equal paths in
whatever order their edges come; `descend` is shared with D* Lite, which therefore finds the very same path.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Protocol, TypeVar


class Ordered(Protocol):
    """What can be a vertex: hashable, and comparable with every other vertex of its graph."""

    def __hash__(self) -> int: ...

    def __lt__(self, other: Any, /) -> bool: ...


V = TypeVar("V", bound=Ordered)


class Graph(Generic[V]):
    """A graph made of all its edges at once; they cost more than 0, and of parallel ones the cheapest counts."""

    def __init__(self, edges: Iterable[tuple[V, V, int]]) -> None:
        self.num_settled = 0
        """Vertices whose cost was found so far."""
        self.num_popped = 0
        """Entries taken from the queue so far: the same, and those that a cheaper one came before."""
        self.successors: dict[V, dict[V, int]] = {}
        self.predecessors: dict[V, dict[V, int]] = {}
        for source, target, weight in edges:
            targets = self.successors.setdefault(source, {})
            if weight < targets.get(target, weight + 1):
                targets[target] = weight
                self.predecessors.setdefault(target, {})[source] = weight

    def shortest_path(self, start: V, goal: V) -> tuple[int, list[V]] | None:
        """The cost and the vertices of the cheapest path; None where there is none."""
        costs = self.costs_to(goal, start)
        if start not in costs:
            return None
        return costs[start], descend(start, goal, lambda vertex: self.successors.get(vertex, {}), costs)

    def costs_to(self, goal: V, until: V | None = None) -> dict[V, int]:
        """What it costs to get to the goal from each vertex that can; ends early where `until` is settled."""
        return self._settle(goal, lambda vertex: self.predecessors.get(vertex, {}), until)

    def costs_from(self, start: V) -> dict[V, int]:
        """What it costs to get from the start to each vertex that can be reached."""
        return self._settle(start, lambda vertex: self.successors.get(vertex, {}))

    def _settle(self, origin: V, neighbours: Callable[[V], Mapping[V, int]], until: V | None = None) -> dict[V, int]:
        """Dijkstra's algorithm: the vertices in the order of their distance from the origin."""
        settled: dict[V, int] = {}
        queue = [(0, origin)]
        best = {origin: 0}
        while queue:
            cost, vertex = heapq.heappop(queue)
            self.num_popped += 1
            if vertex in settled:
                continue
            settled[vertex] = cost
            if vertex == until:
                break
            for neighbour, weight in neighbours(vertex).items():
                through = cost + weight
                if through < best.get(neighbour, through + 1):
                    best[neighbour] = through
                    heapq.heappush(queue, (through, neighbour))
        self.num_settled += len(settled)
        return settled


def descend(start: V, goal: V, successors: Callable[[V], Mapping[V, int]], costs_to_goal: Mapping[V, int]) -> list[V]:
    """The path that follows the costs to the goal down; ties go to the lowest vertex."""
    path = [start]
    while path[-1] != goal:
        path.append(
            min(
                (weight + costs_to_goal[vertex], vertex)
                for vertex, weight in successors(path[-1]).items()
                if vertex in costs_to_goal
            )[1]
        )
    return path
