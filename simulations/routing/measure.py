"""One swarm, one sequence of changes, three planners: what each has to do for every route."""

import statistics
import time
from dataclasses import dataclass, field
from random import Random

from p2pswarm.core.errors import MissingBlocksError
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import BanReason
from p2pswarm.routing.dstar_planner import DStarLitePlanner
from p2pswarm.routing.planner import RouteRequest
from p2pswarm.routing.shortest_path import ShortestPathPlanner
from simulations.routing.dynamic_programming import DynamicProgrammingPlanner
from simulations.routing.world import NUM_BLOCKS, World

REQUEST = RouteRequest(Span(0, NUM_BLOCKS), max_length=2048)
PLANS_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated."""

    num_servers: int
    changed: float = 0.0
    """Part of the servers that changes between two routes."""
    num_changes: int = 0
    """Changes between two routes, beside."""
    num_routes: int = 50
    seed: int = 1

    @property
    def changes_per_route(self) -> int:
        return self.num_changes + round(self.changed * self.num_servers)


@dataclass
class Work:
    """What one planner did for each route but the first."""

    places: list[int] = field(default_factory=list)
    """Taken from the queue, or looked at where there is none."""
    times_s: list[float] = field(default_factory=list)
    """Processor time to take in the changes and to find the route."""
    first_s: float = 0.0
    """The same for the first route, when all is new."""

    @property
    def mean_places(self) -> float:
        return statistics.mean(self.places)

    @property
    def median_ms(self) -> float:
        return 1000 * statistics.median(self.times_s)

    @property
    def mean_ms(self) -> float:
        return 1000 * statistics.mean(self.times_s)

    def note(self, num_places: int, time_s: float, is_first: bool) -> None:
        if is_first:
            self.first_s = time_s
        else:
            self.places.append(num_places)
            self.times_s.append(time_s)


def measure(scenario: Scenario) -> dict[str, Work]:
    """The work of each way to plan. Raises `AssertionError` if their routes are not equally fast."""
    world = World(Random(scenario.seed), scenario.num_servers)
    planners = {
        "D* Lite": DStarLitePlanner(),
        "Dijkstra": ShortestPathPlanner(),
        "plain DP": DynamicProgrammingPlanner(),
    }
    work = {name: Work() for name in planners}
    for number in range(scenario.num_routes + 1):
        for _ in range(scenario.changes_per_route if number else 0):
            world.change()
        costs_us = {}
        for name, planner in planners.items():
            num_places, began_s = planner.statistics().num_popped, time.thread_time()
            costs_us[name] = _cost_us(planner, world, now_s=number * PLANS_EVERY_S)
            time_s = time.thread_time() - began_s
            work[name].note(planner.statistics().num_popped - num_places, time_s, is_first=number == 0)
        world.banned.clear()
        assert len(set(costs_us.values())) == 1, f"in {scenario}, after {number} routes: {costs_us}"
    return work


def _cost_us(planner: ShortestPathPlanner, world: World, now_s: float) -> int | None:
    """Tells the planner what is new, and asks it for a route."""
    for peer_id in world.banned:
        planner.ban(peer_id, now_s, BanReason.UNREACHABLE)
    planner.update(world.servers.values(), world.round_trips_s)
    try:
        return planner.plan(REQUEST, now_s).cost_us
    except MissingBlocksError:
        return None
