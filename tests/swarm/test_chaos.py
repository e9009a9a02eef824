"""Servers die, hang, lie, leave and join at random while a session is used in every way: no answer is ever wrong, and
the user never sees an error, as long as somebody serves each block.

A run is all in its seed: `run_chaos(seed, ...)` with the seed of a failure does the same again.
"""

import functools
import random
from dataclasses import dataclass

import pytest
import trio
from chaos_driver import TROUBLES, ChaosDriver
from chaos_swarm import NUM_BLOCKS, ServedModel, arithmetic_model, open_chaos_swarm, torch_model
from chaos_user import ArithmeticTruth, LlamaTruth, User
from trio.testing import MockClock

from p2pswarm.blocks.span_model import load_span
from p2pswarm.client.config import ClientConfig
from p2pswarm.core.span import Span

SPANS = (*[Span(0, 3), Span(3, 6), Span(6, 8)] * 2, Span(0, 5), Span(2, 7), Span(4, 8), Span(1, 4))
MAX_LENGTH = 120
CONFIG = ClientConfig(known_peers_path=None)
LAST_EVENTS = 60


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    events: tuple[str, ...]
    num_troubles: dict[str, int]
    num_recoveries: int
    longest_step_s: float


async def run_chaos(
    seed: int, num_steps: int, model: ServedModel, truth: object, *, is_calm: bool = False, with_padding: bool = True
) -> Outcome:
    """Uses one session for so many steps amid chaos, and looks whether anything is left behind."""
    trio._core._run._r.seed(seed)  # the order in which tasks run is part of the chaos
    randomness = random.Random(seed)
    async with open_chaos_swarm(SPANS, model, CONFIG, seed) as swarm:
        async with swarm.session(MAX_LENGTH) as session, trio.open_nursery() as chaos:
            driver = ChaosDriver(swarm, session, random.Random(seed))
            user = User(session, truth, randomness, driver.note, with_padding=with_padding)
            if not is_calm:
                chaos.start_soon(driver.run)
            try:
                await user.use(num_steps)
            except Exception as error:
                error.add_note("\n".join([f"seed {seed}; what came before:", *driver.events[-LAST_EVENTS:]]))
                raise
            num_recoveries = session.num_recoveries
            chaos.cancel_scope.cancel()
        for server in swarm.servers.values():
            server.service.fault = None
            server.garbler.is_on = False
            swarm.memory.resume(server.peer_id)
        swarm.memory.heal()
        await swarm.until_quiet()
        for server in swarm.ended:
            assert server.holds_nothing()
        return Outcome(tuple(driver.events), driver.num_troubles, num_recoveries, user.longest_step_s)


async def test_without_chaos_nothing_has_to_be_recovered(autojump_clock: MockClock) -> None:
    outcome = await run_chaos(1, 100, arithmetic_model(), ArithmeticTruth(NUM_BLOCKS), is_calm=True)
    assert outcome.num_recoveries == 0


@pytest.mark.parametrize("seed", range(4))
async def test_no_answer_is_wrong_and_no_error_is_seen(seed: int, autojump_clock: MockClock) -> None:
    outcome = await run_chaos(seed, 400, arithmetic_model(), ArithmeticTruth(NUM_BLOCKS))
    assert outcome.num_recoveries > 20
    assert outcome.longest_step_s < CONFIG.recovery_timeout_s


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
async def test_thousands_of_steps(seed: int, autojump_clock: MockClock) -> None:
    outcome = await run_chaos(seed, 2000, arithmetic_model(), ArithmeticTruth(NUM_BLOCKS))
    assert outcome.num_troubles.keys() == TROUBLES.keys()


async def test_a_real_model_is_as_exact(tiny_llama, local, autojump_clock: MockClock) -> None:
    model = torch_model(tiny_llama, functools.cache(functools.partial(load_span, tiny_llama)), max_length=MAX_LENGTH)
    outcome = await run_chaos(7, 120, model, LlamaTruth(local), with_padding=False)
    assert outcome.num_recoveries > 5


def test_a_seed_is_all_there_is_to_a_run() -> None:
    outcomes = [
        trio.run(
            run_chaos, 3, 150, arithmetic_model(), ArithmeticTruth(NUM_BLOCKS), clock=MockClock(autojump_threshold=0)
        )
        for _ in range(2)
    ]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].num_recoveries > 0
