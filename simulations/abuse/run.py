"""What does a session feel of somebody who attacks its server?

    python -m simulations.abuse.run                      all attacks, four minutes
    python -m simulations.abuse.run --attack "10,000 streams"

Method. One server process of SmolLM2-135M with one thread, and a client beside it that generates greedily, in one
session for each attack: some seconds in quiet, some under the attack, some in quiet again. The attacker is a process
of its own, from another address (one of 127.1.0.0/16), at the lowest priority, since in life it computes elsewhere;
what the server does for it counts. Under the attack another client comes and connects. In the end the server is left
in peace, and its memory is set beside what it was before the first attack, after a round of all attacks that is not
measured, and sessions that fill its cache: keys and values are resident from their first use on.

Exits 1 when a token differs from the local model's, when a session keeps less than 70 % of its speed, when a newcomer
needs more than 8 s, or when memory or sockets do not come back.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import torch
import trio

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.swarm import open_swarm
from simulations.abuse.attacks import ATTACKS
from simulations.abuse.neighbour import Neighbour, seconds_to_get_in
from simulations.abuse.processes import Victim, attacked, open_victim
from swarm_cli.sample_model import sample_model

PROMPT = "Once upon a time, in a house by the sea,"
NUM_TOKENS = 1200
QUIET_S = 4.0
SETTLE_S = 1.0
"""Between the attack's beginning, or its end, and what is measured."""
ATTACK_S = 8.0
WARM_UP_S = 3.0
PEACE_S = 15.0
MIN_SPEED = 0.70
MAX_NEWCOMER_S = 8.0
MAX_GROWTH_BYTES = 24 << 20
"""What Python's and the C library's heaps may keep of a round, and no more after ten."""
CACHE_TOKENS = 4096
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one attack did."""

    name: str
    quiet_tokens_per_s: float
    attacked_tokens_per_s: float
    num_tokens: int
    is_exact: bool
    num_recoveries: int
    newcomer_s: float
    memory_bytes: int
    """Under the attack."""

    @property
    def kept(self) -> float:
        return self.attacked_tokens_per_s / self.quiet_tokens_per_s

    @property
    def is_good(self) -> bool:
        return self.is_exact and self.kept >= MIN_SPEED and self.newcomer_s <= MAX_NEWCOMER_S

    def __str__(self) -> str:
        exact = "exact" if self.is_exact else "WRONG"
        return (
            f"{self.name:32} {self.quiet_tokens_per_s:6.1f} {self.attacked_tokens_per_s:8.1f} tokens/s  "
            f"{self.kept:5.0%}   {self.num_tokens:4} {exact}  {self.num_recoveries} recoveries   "
            f"newcomer {self.newcomer_s:5.2f} s   {self.memory_bytes / MIB:5.0f} MiB"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", choices=ATTACKS, help="this one only")
    flags = parser.parse_args()
    logging.getLogger("p2pswarm").setLevel(logging.ERROR)
    print((__doc__ or "").split("\n\n")[0])
    torch.set_num_threads(1)  # as the server: sums are then made in the same order
    is_good = trio.run(simulate, sample_model(), [flags.attack] if flags.attack else list(ATTACKS))
    return 0 if is_good else 1


async def simulate(model_path: str, names: Sequence[str]) -> bool:
    """Prints what comes out; whether all of it is as it should be."""
    prompt, expected = await trio.to_thread.run_sync(_local_answer, model_path)
    cache = ["--kv-cache", f"{CACHE_TOKENS} tokens"]
    async with (
        open_victim(model_path, cache) as victim,
        open_swarm([victim.address], config=ClientConfig(known_peers_path=None)) as swarm,
    ):
        model = await swarm.load(model_path)
        await _fill_cache(model, expected)
        for name in names:
            async with attacked(name, victim):
                await trio.sleep(WARM_UP_S)
        await trio.sleep(PEACE_S)
        memory_before, sockets_before = victim.memory_bytes(), victim.num_sockets()
        print(f"\n{'':32}  quiet   under attack       kept   tokens")
        outcomes = []
        for name in names:
            outcomes.append(await measure(name, victim, model, prompt, expected))
            print(outcomes[-1], flush=True)
        await trio.sleep(PEACE_S)
        memory_after, sockets_after = victim.memory_bytes(), victim.num_sockets()
    print(f"\nmemory {memory_before / MIB:.0f} MiB before, {memory_after / MIB:.0f} MiB after", end="; ")
    print(f"sockets {sockets_before} before, {sockets_after} after")
    has_shrunk = memory_after - memory_before <= MAX_GROWTH_BYTES and sockets_after <= sockets_before
    return has_shrunk and all(outcome.is_good for outcome in outcomes)


async def measure(
    name: str, victim: Victim, model: DistributedModel, prompt: Sequence[int], expected: Sequence[int]
) -> Outcome:
    """One session, before, under and after the attack."""
    neighbour = Neighbour(expected)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbour.generate, model, prompt)
        await trio.sleep(SETTLE_S)
        quiet = [await _measure_for(QUIET_S, neighbour)]
        async with attacked(name, victim):
            await trio.sleep(SETTLE_S)
            under_attack = await _measure_for(ATTACK_S, neighbour)
            memory_bytes = victim.memory_bytes()
            newcomer_s = await seconds_to_get_in(victim.address)
        await trio.sleep(SETTLE_S)
        quiet.append(await _measure_for(QUIET_S, neighbour))
        nursery.cancel_scope.cancel()
    return Outcome(
        name,
        sum(quiet) / len(quiet),
        under_attack,
        len(neighbour.token_ids),
        neighbour.is_exact,
        neighbour.num_recoveries,
        newcomer_s,
        memory_bytes,
    )


async def _fill_cache(model: DistributedModel, text: Sequence[int]) -> None:
    """Sessions of so many tokens, as many as have room at once."""
    async with AsyncExitStack() as sessions:
        for _ in range(CACHE_TOKENS // (len(text) + 1)):
            session = await sessions.enter_async_context(model.session(max_length=len(text) + 1))
            async for _ in session.generate(list(text), do_sample=False, max_new_tokens=1):
                pass


async def _measure_for(duration_s: float, neighbour: Neighbour) -> float:
    began_at_s = trio.current_time()
    await trio.sleep(duration_s)
    return neighbour.tokens_per_s(began_at_s, trio.current_time())


def _local_answer(model_path: str) -> tuple[list[int], list[int]]:
    """The prompt's token ids, and what the model in this process makes of them. Blocking."""
    checkpoint = open_checkpoint(model_path)
    local: Any = load_local_model(checkpoint)
    token_ids = checkpoint.tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    generated = local.generate(token_ids, do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
    return token_ids[0].tolist(), generated[0, token_ids.shape[1] :].tolist()


if __name__ == "__main__":
    sys.exit(main())
