"""Restarts without end: most tries of a generation that always starts again are drawn by lot, not run.

At one failure in a hundred hand-overs such a generation is tens of thousands of steps, all of which happened before:
each try is the failure-free generation up to the step at which it is lost. So that one is run, and a number of lost
tries, and from them the rest is put together: a try is lost at a step that is drawn, having taken what the failure-free
generation took up to there, and then what a loss took in one of the tries that were run, also drawn.
"""

import math
from collections.abc import Sequence
from random import Random

from simulations.churn.generation import HOUR_S, Generation
from simulations.churn.setting import HANDOVERS_PER_STEP


def losses_s(generation: Generation, without_failures: Generation) -> list[float]:
    """How much longer each lost try took than its tokens: its last step, noticing the failure, connecting again."""
    times_s = (0.0, *without_failures.token_times_s)
    return [lost.elapsed_s - times_s[lost.num_tokens] for lost in generation.lost_tries]


def draw(without_failures: Generation, losses_s: Sequence[float], failure_rate: float, random: Random) -> Generation:
    """A generation with restarts, given one that needed none, and what losses cost."""
    times_s = (0.0, *without_failures.token_times_s)
    num_lost, elapsed_s = 0, 0.0
    while elapsed_s < HOUR_S:
        num_steps = _steps_survived(failure_rate, random)
        if num_steps >= without_failures.num_tokens:
            elapsed_s += times_s[-1]
            break
        num_lost += 1
        elapsed_s += times_s[num_steps] + random.choice(losses_s)
    is_finished = elapsed_s < HOUR_S
    return Generation(without_failures.num_tokens, min(elapsed_s, HOUR_S), is_finished, num_failures=num_lost)


def _steps_survived(failure_rate: float, random: Random) -> int:
    """How many steps a try makes, if it may make any number; a geometric distribution."""
    survives = (1 - failure_rate) ** HANDOVERS_PER_STEP
    return math.floor(math.log(1 - random.random()) / math.log(survives))
