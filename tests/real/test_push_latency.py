"""How many one-way trips a token takes over servers that are far away: with push one more than there are servers,
without it two for each.

Compute and everything else that is not the network is what the same tokens take over the same proxies without delay.
"""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles

import pytest
import trio
from delayed_swarm import delayed_swarm

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.swarm import open_swarm
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.exhaustive]

SPANS = (Span(0, 3), Span(3, 6), Span(6, 8))
ONE_WAY_S = 0.05
SLACK_S = ONE_WAY_S / 2
"""Half a trip: one trip too many does not go unnoticed."""
PROMPT = (11, 7, 5, 3)
NUM_TOKENS = 24

logger = logging.getLogger(__name__)


async def token_time_s(model: str, peers: Sequence[str], use_push: bool, token_ids: list[int]) -> float:
    """How long a token after the first takes when nothing else keeps the machine busy: the lower quartile. The tokens
    go to `token_ids`."""
    config = ClientConfig(known_peers_path=None, use_push=use_push)
    came_at_s = []
    async with open_swarm(peers, config=config) as swarm:
        distributed = await swarm.load(model)
        async with distributed.session(max_length=len(PROMPT) + NUM_TOKENS) as session:
            async for token_id in session.generate(PROMPT, max_new_tokens=NUM_TOKENS, do_sample=False):
                came_at_s.append(trio.current_time())
                token_ids.append(token_id)
    times_s = [later_s - earlier_s for earlier_s, later_s in itertools.pairwise(came_at_s)]
    return quantiles(times_s, n=4)[0]


async def test_a_token_takes_four_trips_with_push_and_six_without(tmp_path: Path) -> None:
    model = str(save_tiny_checkpoint(tmp_path / "tiny", "llama", eos_token_id=None))
    compute, relayed, pushed = [], [], []
    async with delayed_swarm(model, SPANS, tmp_path) as swarm:
        compute_s = await token_time_s(model, swarm.peers, False, compute)
        await swarm.proxies.set_delay(ONE_WAY_S)
        relayed_s = await token_time_s(model, swarm.peers, False, relayed)
        pushed_s = await token_time_s(model, swarm.peers, True, pushed)
    figures = f"a token took {compute_s:.4f} s without delay, {relayed_s:.4f} s relayed, {pushed_s:.4f} s pushed"
    logger.info(figures)
    assert relayed == pushed == compute
    assert len(compute) == NUM_TOKENS
    assert 6 * ONE_WAY_S <= relayed_s <= 6 * ONE_WAY_S + compute_s + SLACK_S, figures
    assert 4 * ONE_WAY_S <= pushed_s <= 4 * ONE_WAY_S + compute_s + SLACK_S, figures
