"""One generation of the simulation: a policy, a length, a failure rate, a seed; and what came of it."""

from dataclasses import dataclass
from functools import partial

import trio
from trio.testing import MockClock

from simulations.churn.policies import LostTry, Policy, Progress, generate
from simulations.churn.setting import Setting
from simulations.churn.stage_model import true_tokens
from simulations.churn.world import open_world

HOUR_S = 3600.0
"""A generation that takes longer has not finished; the paper's limit."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What came of one; times are simulated."""

    num_tokens: int
    """Wanted."""
    elapsed_s: float
    is_finished: bool
    num_failures: int
    """Hand-overs that failed."""
    num_errors: int = 0
    """Failures that came out of the client where it should have dealt with them."""
    token_times_s: tuple[float, ...] = ()
    """When each token came, since the last restart."""
    lost_tries: tuple[LostTry, ...] = ()


def simulate(
    policy: Policy, setting: Setting, num_tokens: int, failure_rate: float, seed: int, max_steps: int | None = None
) -> Generation:
    """Runs it, at most `max_steps` steps of it; about four milliseconds of real time a step.

    Raises `AssertionError` when a token is wrong.
    """
    simulation = partial(_simulate, policy, setting, num_tokens, failure_rate, seed, max_steps)
    return trio.run(simulation, clock=MockClock(autojump_threshold=0))


async def _simulate(
    policy: Policy, setting: Setting, num_tokens: int, failure_rate: float, seed: int, max_steps: int | None
) -> Generation:
    async with open_world(setting, failure_rate, seed, policy.config) as world:
        progress = Progress(max_steps)
        began_at_s = trio.current_time()
        with trio.move_on_after(HOUR_S):
            await generate(policy, world, num_tokens, progress)
        assert tuple(progress.tokens) == true_tokens(num_tokens)[: len(progress.tokens)], "the text is wrong"
        return Generation(
            num_tokens,
            trio.current_time() - began_at_s,
            len(progress.tokens) == num_tokens,
            world.num_failures,
            progress.num_errors,
            tuple(progress.token_times_s),
            tuple(progress.lost_tries),
        )
