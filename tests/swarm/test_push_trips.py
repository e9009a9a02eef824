"""A token over n servers takes n + 1 trips where they hand on to each other, and 2n where the client relays."""

import pytest
import torch
import trio
from chaos_swarm import LATENCY_S, arithmetic_model, open_chaos_swarm

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.span import Span

SPANS = (Span(0, 3), Span(3, 5), Span(5, 8))
COMPUTE_S = 0.010
NUM_TOKENS = 20


async def trips_per_token(*, use_push: bool) -> float:
    """Beside the time that the servers compute."""
    config = ClientConfig(known_peers_path=None, use_push=use_push)
    async with (
        open_chaos_swarm(SPANS, arithmetic_model(delay_s=COMPUTE_S), config) as swarm,
        swarm.session(max_length=NUM_TOKENS + 8) as session,
    ):
        for position in range(8):  # meanwhile the servers find each other
            await session.step(StepInput(torch.ones(1, 1, 1), position))
        started_at_s = trio.current_time()
        for position in range(8, 8 + NUM_TOKENS):
            await session.step(StepInput(torch.ones(1, 1, 1), position))
        token_s = (trio.current_time() - started_at_s) / NUM_TOKENS
        return (token_s - len(SPANS) * COMPUTE_S) / LATENCY_S


@pytest.mark.parametrize(("use_push", "trips"), [(True, len(SPANS) + 1), (False, 2 * len(SPANS))])
async def test_token_takes_as_many_one_way_trips_as_it_must(autojump_clock, use_push, trips) -> None:
    assert await trips_per_token(use_push=use_push) == pytest.approx(trips, abs=0.05)
