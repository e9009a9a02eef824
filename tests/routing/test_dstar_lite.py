"""D* Lite against Dijkstra after any changes, and the invariants that make it right."""

import random
from collections import Counter
from itertools import pairwise

import networkx
import pytest

from p2pswarm.routing.dstar_lite import DStarLite

NUM_VERTICES, GOAL, ELSEWHERE = 9, 0, 999


class Watched(DStarLite[int]):
    """Counts how often each vertex is expanded, and says what must hold inside."""

    def __init__(self, goal: int) -> None:
        super().__init__(goal)
        self.expansions: Counter[int] = Counter()

    def _improve(self, vertex: int) -> None:
        self.expansions[vertex] += 1
        super()._improve(vertex)

    def _give_up(self, vertex: int) -> None:
        self.expansions[vertex] += 1
        super()._give_up(vertex)

    def check(self, edges: dict[tuple[int, int], int]) -> None:
        infinite = float("inf")
        for vertex in range(NUM_VERTICES):
            ways = [
                cost + self._g.get(target, infinite) for (source, target), cost in edges.items() if source == vertex
            ]
            expected = 0 if vertex == GOAL else min(ways, default=infinite)
            assert self._rhs.get(vertex, infinite) == expected
        inconsistent = {vertex for vertex in range(NUM_VERTICES) if self._g.get(vertex) != self._rhs.get(vertex)}
        assert self._keys == {
            vertex: min(self._g.get(vertex, infinite), self._rhs.get(vertex, infinite)) for vertex in inconsistent
        }
        assert {(key, vertex) for vertex, key in self._keys.items()} <= set(self._heap)

    def settled(self) -> dict[int, int]:
        """All costs to the goal, once nothing is left in the queue."""
        assert self.cost(ELSEWHERE) is None
        assert not self._keys
        return self._g


class Changes:
    """A graph that changes at random, edge by edge and vertex by vertex, and the same graph for networkx."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.most = self.random.choice([3, 1000, 10**12])  # small costs make ties
        self.dstar = Watched(GOAL)
        self.edges: dict[tuple[int, int], int] = {}
        self.banned: dict[tuple[int, int], int] = {}
        for _ in range(self.random.randrange(30)):
            self.change_edge()

    def set_edge(self, edge: tuple[int, int], cost: int | None) -> None:
        self.dstar.set_edge(*edge, cost)
        self.edges.pop(edge, None)
        if cost is not None:
            self.edges[edge] = cost

    def change_edge(self) -> None:
        """A new edge, a dearer, cheaper or equal one, or none."""
        edge = self.random.randrange(NUM_VERTICES), self.random.randrange(NUM_VERTICES)
        if edge not in self.banned:
            self.set_edge(edge, self.random.choice([None, *[self.random.randint(1, self.most)] * 3]))

    def ban(self) -> None:
        """All ways into a vertex vanish together."""
        vertex = self.random.randrange(NUM_VERTICES)
        for edge, cost in list(self.edges.items()):
            if edge[1] == vertex:
                self.set_edge(edge, None)
                self.banned[edge] = cost

    def forgive(self) -> None:
        """And all that vanished come back."""
        for edge, cost in self.banned.items():
            self.set_edge(edge, cost)
        self.banned.clear()

    def change(self) -> None:
        for _ in range(self.random.randint(1, 4)):
            self.random.choice([self.change_edge, self.change_edge, self.change_edge, self.ban, self.forgive])()

    def costs_by_networkx(self) -> dict[int, int]:
        backwards = networkx.DiGraph()
        backwards.add_node(GOAL)
        backwards.add_weighted_edges_from((target, source, cost) for (source, target), cost in self.edges.items())
        return dict(networkx.single_source_dijkstra_path_length(backwards, GOAL))

    def check_start(self, expected: dict[int, int]) -> None:
        """One start, anywhere: what it costs, and that its path is one, and costs that."""
        start = self.random.randrange(NUM_VERTICES)
        self.dstar.expansions.clear()
        assert self.dstar.cost(start) == expected.get(start)
        assert max(self.dstar.expansions.values(), default=0) <= 2
        path = self.dstar.path(start)
        if path is None:
            assert start not in expected
            return
        assert (path[0], path[-1]) == (start, GOAL)
        assert len(set(path)) == len(path)
        assert sum(self.edges[edge] for edge in pairwise(path)) == expected[start]
        self.dstar.check(self.edges)

    def run(self, num_changes: int) -> None:
        for _ in range(num_changes):
            self.change()
            self.dstar.check(self.edges)
            expected = self.costs_by_networkx()
            for _ in range(self.random.randint(0, 3)):  # none: changes gather
                self.check_start(expected)
        fresh = Watched(GOAL)
        for edge, cost in self.edges.items():
            fresh.set_edge(*edge, cost)
        assert self.dstar.settled() == fresh.settled() == self.costs_by_networkx()
        num_expanded = self.dstar.num_expanded
        for start in range(NUM_VERTICES):
            self.dstar.path(start)
        assert self.dstar.num_expanded == num_expanded


def test_costs_equal_dijkstras_after_any_changes() -> None:
    for seed in range(150):
        run_changes(seed)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_costs_equal_dijkstras_after_five_thousand_sequences_of_changes() -> None:
    for seed in range(5000):
        run_changes(seed)


def run_changes(seed: int) -> None:
    try:
        Changes(seed).run(num_changes=20)
    except AssertionError as error:
        raise AssertionError(f"with seed {seed}") from error


def line(length: int) -> DStarLite[int]:
    """0 <- 1 <- 2 <- ..."""
    dstar = DStarLite(GOAL)
    for vertex in range(length):
        dstar.set_edge(vertex + 1, vertex, 10)
    return dstar


def test_nothing_is_looked_at_where_nothing_changed() -> None:
    dstar = line(100)
    assert dstar.cost(100) == 1000
    num_popped = dstar.num_popped
    dstar.set_edge(50, 49, 10)
    assert [dstar.cost(start) for start in (100, 7, 55)] == [1000, 70, 550]
    assert dstar.num_popped == num_popped


def test_change_far_from_the_goal_costs_little() -> None:
    dstar = line(100)
    dstar.cost(100)
    num_expanded = dstar.num_expanded
    dstar.set_edge(98, 97, 11)
    assert dstar.cost(100) == 1001
    assert dstar.num_expanded - num_expanded == 4  # 98 and 99, each given up once and settled once


def test_change_off_the_path_is_not_even_settled() -> None:
    dstar = line(100)
    dstar.set_edge(100, GOAL, 5000)
    dstar.cost(100)
    num_expanded = dstar.num_expanded
    dstar.set_edge(100, GOAL, 4000)
    assert dstar.path(100) == list(range(100, -1, -1))
    assert dstar.num_expanded == num_expanded


def test_of_equal_paths_the_one_through_the_lowest_vertices_is_taken() -> None:
    dstar = DStarLite(GOAL)
    for middle in (3, 1, 2):
        dstar.set_edge(9, middle, 5)
        dstar.set_edge(middle, GOAL, 5)
    assert dstar.path(9) == [9, 1, 0]


def test_goal_is_reached_at_no_cost_and_a_stranger_never() -> None:
    dstar = line(3)
    assert dstar.path(GOAL) == [GOAL]
    assert dstar.cost(GOAL) == 0
    assert dstar.path(ELSEWHERE) is None


def test_edges_cost_more_than_nothing() -> None:
    with pytest.raises(ValueError, match="whole number above 0, got 0 from 1 to 2"):
        DStarLite(GOAL).set_edge(1, 2, 0)


def test_vertices_that_come_and_go_and_changes_that_nobody_asks_about_leave_nothing_behind() -> None:
    dstar = Watched(GOAL)
    dstar.set_edge(1, GOAL, 5)
    assert dstar.cost(1) == 5
    for vertex in range(100, 5000):
        dstar.set_edge(1, vertex, vertex)
        dstar.set_edge(vertex, GOAL, 2 * vertex)
        dstar.set_edge(vertex, GOAL, 3 * vertex)
        dstar.set_edge(vertex, GOAL, None)
        dstar.set_edge(1, vertex, None)
    kept = (dstar._g, dstar._rhs, dstar._keys, dstar._successors, dstar._predecessors)
    assert [len(facts) for facts in kept] == [1, 2, 1, 1, 1]  # vertex 1 is in the queue: its g was never needed
    assert len(dstar._heap) < 200
