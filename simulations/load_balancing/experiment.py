"""Swarms that grow, rest for an hour and then change all the time; how far from the optimum they are meanwhile."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from random import Random

from simulations.load_balancing.machines import MIXTURES, Machine
from simulations.load_balancing.optimum import exact_optimum, optimum_bound
from simulations.load_balancing.policies import Policy, decider
from simulations.load_balancing.world import Pace, World

HOUR_S = 3600.0
MOST_SERVERS_EXACT = 8
"""Larger swarms are held against a bound, which no arrangement may reach."""
MILP_TIME_LIMIT_S = 4.0
SETTLING_S = HOUR_S / 2
"""From the last one's joining until a swarm should have come to rest."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a swarm is, and how long it is watched."""

    num_servers: int
    num_model_blocks: int
    num_seeds: int
    change_s: float
    """How long it changes; 0: not at all."""
    policies: tuple[Policy, ...] = tuple(Policy)


SIZES = (
    Size(8, 12, 5, 2 * HOUR_S),
    Size(20, 24, 3, HOUR_S),
    Size(50, 40, 3, HOUR_S, (Policy.NEVER, Policy.SHIPPED, Policy.EAGER)),
    Size(100, 60, 2, HOUR_S, (Policy.NEVER, Policy.SHIPPED)),
    Size(300, 80, 1, HOUR_S / 4, (Policy.NEVER, Policy.SHIPPED)),
    Size(1000, 100, 1, 0.0, (Policy.NEVER, Policy.SHIPPED)),
)
QUICK_SIZES = (Size(6, 12, 2, HOUR_S / 2), Size(30, 24, 1, HOUR_S / 4, (Policy.SHIPPED,)))
LIFETIME_S = 3 * HOUR_S
"""Of a server, on average, while a swarm changes: a volunteer's evening."""
NUM_SAMPLES = 6
"""Of a swarm that changes, evenly over the time."""


@dataclass(frozen=True, slots=True)
class Run:
    """What became of one swarm. Shares are of the optimum's throughput; swarms that cannot serve at all have none."""

    mixture: str
    size: Size
    policy: Policy
    share: float | None
    """After growing and coming to rest."""
    num_moves: int
    """While it grew and came to rest."""
    num_calm_moves: int
    """In the hour after that, in which nobody came or went."""
    changing_shares: tuple[float, ...]
    """While it changed, counting servers where they are or will be."""
    changing_shares_online: tuple[float, ...]
    """The same, counting those who took requests at that moment."""
    num_changes: int
    """Servers that went, each replaced by another sooner or later."""
    num_changing_moves: int
    num_blocks_reloaded: int
    """By servers that moved, over all the time."""
    num_withdrawn: int
    """Wishes to move that were given up at the second look, over all the time."""


@dataclass(frozen=True, slots=True)
class Cell:
    """All swarms of one mixture, size and policy."""

    mixture: str
    size: Size
    policy: Policy
    runs: tuple[Run, ...]

    @property
    def shares(self) -> list[float]:
        return [run.share for run in self.runs if run.share is not None]

    @property
    def changing_shares(self) -> list[float]:
        return [share for run in self.runs for share in run.changing_shares]

    @property
    def changing_shares_online(self) -> list[float]:
        return [share for run in self.runs for share in run.changing_shares_online]

    def mean(self, value: Callable[[Run], float]) -> float:
        return statistics.mean(value(run) for run in self.runs)


def run_all(sizes: Sequence[Size], report: Callable[[Cell], None]) -> list[Cell]:
    """All cells; `report` hears of each when it is there."""
    cells = []
    for size in sizes:
        for mixture in MIXTURES:
            for policy in size.policies:
                runs = tuple(run(mixture, size, policy, seed) for seed in range(1, size.num_seeds + 1))
                cells.append(Cell(mixture, size, policy, runs))
                report(cells[-1])
    return cells


def run(mixture: str, size: Size, policy: Policy, seed: int) -> Run:
    """One swarm; the same machines come and go under every policy."""
    fate = Random(f"{mixture}, {size.num_servers}, {seed}")
    world = World(
        size.num_model_blocks, decider(policy, Random(f"decisions, {seed}")), Pace(), Random(f"world, {seed}")
    )
    for _ in range(size.num_servers):
        world.join(MIXTURES[mixture](size.num_model_blocks, fate))
        world.run_until(world.now_s + fate.expovariate(size.num_servers / HOUR_S))
    world.run_until(world.now_s + SETTLING_S)
    share, num_moves = _share(world, world.throughput()), world.num_moves
    world.run_until(world.now_s + HOUR_S)
    num_calm_moves = world.num_moves - num_moves
    samples, num_changes = _change(world, mixture, size, fate)
    return Run(
        mixture,
        size,
        policy,
        share,
        num_moves,
        num_calm_moves,
        tuple(settled for settled, _ in samples),
        tuple(online for _, online in samples),
        num_changes,
        world.num_moves - num_moves - num_calm_moves,
        world.num_blocks_reloaded,
        world.num_withdrawn,
    )


def _change(world: World, mixture: str, size: Size, fate: Random) -> tuple[list[tuple[float, float]], int]:
    """Servers go and come; the shares of the optimum at some moments, and how many went."""
    end_s = world.now_s + size.change_s
    sample_times_s = [world.now_s + size.change_s * (number + 1) / NUM_SAMPLES for number in range(NUM_SAMPLES)]
    samples, num_changes = [], 0
    while world.now_s < end_s:
        next_change_s = world.now_s + fate.expovariate(size.num_servers / LIFETIME_S)
        while sample_times_s and sample_times_s[0] <= next_change_s:
            world.run_until(sample_times_s.pop(0))
            settled, online = _share(world, world.throughput()), _share(world, world.throughput_online())
            if settled is not None and online is not None:
                samples.append((settled, online))
        world.run_until(next_change_s)
        world.leave(world.servers[fate.choice(list(world.servers))])
        world.join(MIXTURES[mixture](size.num_model_blocks, fate))
        num_changes += 1
    return samples, num_changes


def _share(world: World, throughput: float) -> float | None:
    machines = sorted((server.machine for server in world.servers.values()), key=astuple)
    optimum = _optimum(world.num_model_blocks, tuple(machines))
    return throughput / optimum if optimum > 0 else None


@cache  # the same machines come and go under every policy
def _optimum(num_model_blocks: int, machines: tuple[Machine, ...]) -> float:
    if len(machines) <= MOST_SERVERS_EXACT:
        return exact_optimum(num_model_blocks, machines, MILP_TIME_LIMIT_S).bound
    return optimum_bound(num_model_blocks, machines)
