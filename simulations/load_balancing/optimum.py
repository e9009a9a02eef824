"""The best that a set of machines could do, wherever each had its blocks: exact, or at least a bound that none exceeds.

Maximise the throughput m of the worst block. One variable for each kind of machine and start of its window:

    for each block:    sum over the windows that hold it, of throughput * number of machines there  >=  m
    for each kind:     its numbers add up to how many machines there are

With whole numbers this is a mixed-integer programme, solved by HiGHS through `scipy.optimize.milp`. With any numbers it
is a linear programme whose value no arrangement exceeds; in that one, machines of equally many blocks can be added up.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from simulations.load_balancing.machines import Machine

MAX_GAP = 0.01
"""Between the best arrangement found and what none exceeds, relative: nearer is not searched."""


@dataclass(frozen=True, slots=True)
class Optimum:
    """Tokens per second of the worst block."""

    found: float
    """Of an arrangement that exists; not more than `bound`."""
    bound: float
    """No arrangement has more."""

    @property
    def is_exact(self) -> bool:
        return self.bound - self.found <= 2 * MAX_GAP * self.bound


def exact_optimum(num_model_blocks: int, machines: Sequence[Machine], time_limit_s: float) -> Optimum:
    """The best arrangement; where the time does not suffice, the best found and what is known to be impossible."""
    kinds = sorted(Counter(machines).items(), key=lambda kind: kind[0].num_blocks)
    return _solve(num_model_blocks, kinds, is_whole=True, time_limit_s=time_limit_s)


def optimum_bound(num_model_blocks: int, machines: Sequence[Machine]) -> float:
    """What no arrangement exceeds: that of machines which can be divided."""
    totals: dict[int, float] = defaultdict(float)
    for machine in machines:
        totals[machine.num_blocks] += machine.throughput_tokens_per_s
    kinds = [(Machine(num_blocks, total), 1) for num_blocks, total in sorted(totals.items())]
    return _solve(num_model_blocks, kinds, is_whole=False, time_limit_s=math.inf).bound


def _solve(
    num_model_blocks: int, kinds: Sequence[tuple[Machine, int]], *, is_whole: bool, time_limit_s: float
) -> Optimum:
    """For kinds of machines and how many there are of each."""
    windows = [
        (kind, start)
        for kind, (machine, _) in enumerate(kinds)
        for start in range(num_model_blocks - machine.num_blocks + 1)
    ]
    minimum = len(windows)  # the column of m, after those of the windows
    entries = [(block, minimum, -1.0) for block in range(num_model_blocks)]
    for column, (kind, start) in enumerate(windows):
        machine, _ = kinds[kind]
        entries += [
            (block, column, machine.throughput_tokens_per_s) for block in range(start, start + machine.num_blocks)
        ]
    rows, columns, values = zip(*entries, strict=True)
    served = coo_array((values, (rows, columns)), shape=(num_model_blocks, minimum + 1)).tocsr()
    owners = ([kind for kind, _ in windows], range(minimum))
    placed = coo_array((np.ones(minimum), owners), shape=(len(kinds), minimum + 1)).tocsr()
    counts = [count for _, count in kinds]
    solved = milp(
        c=np.append(np.zeros(minimum), -1.0),
        constraints=[LinearConstraint(served, 0, np.inf), LinearConstraint(placed, counts, counts)],
        integrality=np.append(np.full(minimum, int(is_whole)), 0),
        bounds=Bounds(0, np.inf),
        options={"mip_rel_gap": MAX_GAP, "time_limit": time_limit_s},
    )
    found = 0.0 if solved.fun is None else -solved.fun
    if not is_whole:
        return Optimum(found, found)
    assert solved.mip_dual_bound is not None, "HiGHS proves at least the linear programme's bound"
    return Optimum(found, -solved.mip_dual_bound)
