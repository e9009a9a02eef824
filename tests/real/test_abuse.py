"""A server process under each of the attacks of `simulations.abuse`: a session beside stays exact, nothing is left.

How much of its speed the session keeps is measured by `python -m simulations.abuse.run`, not here.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.swarm import open_swarm
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from simulations.abuse.attacks import ATTACKS
from simulations.abuse.neighbour import seconds_to_get_in
from simulations.abuse.processes import Victim, attacked, open_victim
from swarmd.unused_memory import PERIOD_S

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPT = [5, 17, 80, 33]
NUM_TOKENS = 240
TOKENS_UNDER_ATTACK = 3
PAUSE_S = 0.25
"""Between two tokens of the session, so that one session sees all of an attack."""
TOKEN_TIMEOUT_S = 20.0
MAX_NEWCOMER_S = 15.0
"""On a machine that the attacker shares."""
CLEAR_TIMEOUT_S = 30.0
CACHE_TOKENS = 1024
MAX_GROWTH_BYTES = 16 << 20
"""In a second round of all attacks; the first one has touched what Python's heap keeps."""
PEACE_S = PERIOD_S + 1.0
"""After the first round: what is free in the heap goes back to the system."""


class Session:
    """One that takes a token now and then."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.num_recoveries = 0

    async def run(self, model: DistributedModel) -> None:
        async with model.session(max_length=len(PROMPT) + NUM_TOKENS) as session:
            prompt: list[int] | None = PROMPT
            while True:
                async for token_id in session.generate(prompt, do_sample=False, max_new_tokens=1, eos_token_id=[]):
                    self.token_ids.append(token_id)
                self.num_recoveries = session.num_recoveries
                prompt = None
                await trio.sleep(PAUSE_S)

    async def take(self, num_tokens: int) -> None:
        """Returns when so many more have come."""
        wanted = len(self.token_ids) + num_tokens
        with trio.fail_after(num_tokens * TOKEN_TIMEOUT_S):
            while len(self.token_ids) < wanted:  # noqa: ASYNC110 - nobody else wants to know
                await trio.sleep(0.05)


@asynccontextmanager
async def session_beside(victim: Victim, folder: Path) -> AsyncIterator[Session]:
    session = Session()
    async with open_swarm([victim.address], config=ClientConfig(known_peers_path=None)) as swarm:
        model = await swarm.load(str(folder))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run, model)
            yield session
            nursery.cancel_scope.cancel()


async def until_clear(victim: Victim, num_sockets: int) -> None:
    with trio.fail_after(CLEAR_TIMEOUT_S):
        while victim.num_sockets() > num_sockets:  # noqa: ASYNC110 - another process tells nobody
            await trio.sleep(0.1)


def local_answer(folder: Path) -> list[int]:
    local: Any = load_local_model(open_checkpoint(str(folder)))
    generated = local.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=[])
    return list(generated[0, len(PROMPT) :].tolist())


async def test_a_session_beside_all_attacks_stays_exact_and_nothing_is_left(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "tiny", "llama")
    expected = local_answer(folder)
    memory_bytes = 0
    async with open_victim(str(folder), ["--kv-cache", f"{CACHE_TOKENS} tokens"]) as victim:
        num_sockets = victim.num_sockets()
        for is_first in (True, False):
            for name in ATTACKS:
                async with session_beside(victim, folder) as session:
                    await session.take(1)
                    async with attacked(name, victim):
                        await session.take(TOKENS_UNDER_ATTACK)
                        if is_first:
                            assert await seconds_to_get_in(victim.address) < MAX_NEWCOMER_S, name
                    await session.take(1)
                assert session.token_ids == expected[: len(session.token_ids)], name
                assert session.num_recoveries == 0, name
                await until_clear(victim, num_sockets)
            if is_first:
                await trio.sleep(PEACE_S)
                memory_bytes = victim.memory_bytes()
        with trio.fail_after(CLEAR_TIMEOUT_S):
            while victim.memory_bytes() - memory_bytes >= MAX_GROWTH_BYTES:  # noqa: ASYNC110 - as above
                await trio.sleep(0.5)
