"""All cells of the table: each policy at each length and failure rate, over several seeds."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from simulations.churn.drawn import draw, losses_s
from simulations.churn.generation import Generation, simulate
from simulations.churn.policies import Policy
from simulations.churn.setting import PAPER_SETTING

RATES = (0.0, 1e-4, 1e-3, 1e-2)
LENGTHS = (128, 1024)
LOSSES_RATE, LOSSES_STEPS = 1e-2, 400
"""To see what a restart costs, so many steps are run at this rate with each seed: some twenty tries are lost."""
NUM_DRAWN = 3000
"""Generations with restarts."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy, length and failure rate; `generations` differ by their seeds."""

    policy: Policy
    num_tokens: int
    failure_rate: float
    generations: tuple[Generation, ...]

    @property
    def part_finished(self) -> float:
        return statistics.mean(generation.is_finished for generation in self.generations)

    @property
    def steps_per_s(self) -> float:
        """Tokens of finished texts over the time of all generations; 0 where none has finished."""
        num_finished = sum(generation.is_finished for generation in self.generations)
        return num_finished * self.num_tokens / sum(generation.elapsed_s for generation in self.generations)

    @property
    def spread(self) -> tuple[float, float]:
        """Steps/s of the slow and of the fast generations: the 10th and the 90th percentile."""
        speeds = sorted(g.num_tokens / g.elapsed_s if g.is_finished else 0.0 for g in self.generations)
        return speeds[(len(speeds) - 1) // 10], speeds[-1 - (len(speeds) - 1) // 10]

    @property
    def num_failures(self) -> float:
        """Hand-overs that failed, a generation."""
        return statistics.mean(generation.num_failures for generation in self.generations)

    @property
    def num_errors(self) -> int:
        """Of all generations together."""
        return sum(generation.num_errors for generation in self.generations)


def run_all(lengths: Sequence[int], seeds: Sequence[int], report: Callable[[Cell], None]) -> list[Cell]:
    """All cells; `report` hears of each when it is there."""
    restart_losses_s = _restart_losses_s(seeds)
    cells = []
    for policy in Policy:
        for num_tokens in lengths:
            for rate, generations in _generations(policy, num_tokens, seeds, restart_losses_s):
                cells.append(Cell(policy, num_tokens, rate, tuple(generations)))
                report(cells[-1])
    return cells


def _generations(
    policy: Policy, num_tokens: int, seeds: Sequence[int], restart_losses_s: Sequence[float]
) -> Iterator[tuple[float, list[Generation]]]:
    """For each failure rate. Without failures all seeds are the same; restarts are drawn."""
    without_failures = simulate(policy, PAPER_SETTING, num_tokens, 0.0, seeds[0])
    yield 0.0, [without_failures]
    for rate in RATES[1:]:
        if policy is Policy.RESTARTS:
            random = Random(f"{seeds[0]}, {num_tokens}, {rate}")
            yield rate, [draw(without_failures, restart_losses_s, rate, random) for _ in range(NUM_DRAWN)]
        else:
            yield rate, [simulate(policy, PAPER_SETTING, num_tokens, rate, seed) for seed in seeds]


def _restart_losses_s(seeds: Sequence[int]) -> list[float]:
    without_failures = simulate(Policy.RESTARTS, PAPER_SETTING, LOSSES_STEPS, 0.0, seeds[0])
    found: list[float] = []
    for seed in seeds:
        with_losses = simulate(Policy.RESTARTS, PAPER_SETTING, LOSSES_STEPS, LOSSES_RATE, seed, max_steps=LOSSES_STEPS)
        found += losses_s(with_losses, without_failures)
    return found
