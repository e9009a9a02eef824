"""What does a swarm's key cost, in tokens per second? And are the tokens the same?

    python -m simulations.private_swarm.run --rounds 15

Method. The same model twice in server processes of their own, once as an open swarm and once as a private one. One
client process is in both. In each round it decodes the same number of tokens over each of them, one after the other,
every other round in the reverse order, so that what else goes on at the machine meets both. The key is in handshakes
only, so the median of the rounds' ratios is expected at 1.

Exits 1 when a token differs, or when the private swarm has less than 95 % of the open one's speed.
"""

import argparse
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import trio

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.swarm import open_swarm
from p2pswarm.net.identity import Identity
from p2pswarm.net.private.swarm_key import SwarmKey
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm, split_evenly
from swarm_cli.sample_model import sample_model

MIN_RATIO = 0.95
PROMPT_IDS = [5, 17, 99]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M")
    parser.add_argument("--servers", type=int, default=2, help="of each swarm")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=32, help="of each swarm in each round")
    flags = parser.parse_args()
    print((__doc__ or "").split("\n\n")[0])
    torch.set_num_threads(1)  # as the servers
    found = trio.run(compare, flags.model or sample_model(), flags.servers, flags.rounds, flags.tokens)
    print(found)
    return 0 if found.are_same and median(found.ratios) >= MIN_RATIO else 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came out."""

    ratios: tuple[float, ...]
    """Speed of the private swarm over that of the open one, in each round."""
    are_same: bool
    """Whether all tokens were."""

    def __str__(self) -> str:
        ratios = f"median {median(self.ratios):.3f}, {min(self.ratios):.3f} to {max(self.ratios):.3f}"
        return f"private / open: {ratios}\ntokens: {'the same' if self.are_same else 'DIFFERENT'}"


async def compare(model_path: str, num_servers: int, num_rounds: int, num_tokens: int) -> Comparison:
    """Prints each round."""
    ratios: list[float] = []
    are_same = True
    with TemporaryDirectory(prefix="private-") as folder:
        async with both_swarms(model_path, num_servers, Path(folder)) as models:
            for number in range(num_rounds + 1):
                order = models if number % 2 else models[::-1]
                decoded = {model: await decode(model, num_tokens) for model in order}
                (open_ids, open_s), (private_ids, private_s) = (decoded[model] for model in models)
                are_same = are_same and open_ids == private_ids
                if number:  # the first is for warming up
                    ratios.append(open_s / private_s)
                    print(f"open {num_tokens / open_s:6.1f} tokens/s, private {num_tokens / private_s:6.1f}")
    return Comparison(tuple(ratios), are_same)


@asynccontextmanager
async def both_swarms(
    model_path: str, num_servers: int, folder: Path
) -> AsyncIterator[tuple[DistributedModel, DistributedModel]]:
    """The model over an open and over a private swarm."""
    key_path = folder / "swarm.key"
    SwarmKey.generate(Identity.generate()).save(key_path)
    spans = split_evenly(open_checkpoint(model_path).num_blocks, num_servers)
    models = []
    async with AsyncExitStack() as stack:
        for path in (None, key_path):
            plan = LocalSwarmPlan(model_path, spans, threads=1, swarm_key=path)
            servers = await stack.enter_async_context(local_swarm(plan))
            key = None if path is None else SwarmKey.load(path)
            config = ClientConfig(known_peers_path=None)
            swarm = await stack.enter_async_context(open_swarm(servers[0].addresses, config=config, swarm_key=key))
            models.append(await swarm.load(model_path))
        yield models[0], models[1]


async def decode(model: DistributedModel, num_tokens: int) -> tuple[list[int], float]:
    """Greedy tokens after the first, and the seconds they took."""
    async with model.session(max_length=len(PROMPT_IDS) + num_tokens + 1) as session:
        options = {"do_sample": False, "min_new_tokens": num_tokens + 1, "max_new_tokens": num_tokens + 1}
        tokens = session.generate(PROMPT_IDS, **options)
        await anext(tokens)
        begun_s = trio.current_time()
        token_ids = [token_id async for token_id in tokens]
        return token_ids, trio.current_time() - begun_s


if __name__ == "__main__":
    raise SystemExit(main())
