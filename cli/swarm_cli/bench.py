"""`swarm bench`: is a swarm as fast as the local model? Both measured in one run, by the same `generate`, in turn.

What is measured, each the median over the rounds, after one round that does not count:

- decode tokens/s: tokens after the first over the time they took, from a short prompt, greedy;
- time to first token: from handing over a long prompt until the first token, opening the session included;
- overhead a hop: (swarm's ms a token - local ms a token) / hops.

The local model runs in this process with as many torch threads as each server has, in the same dtype, while the servers
have nothing to do, and the other way round.
"""

import argparse
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
import trio
from rich.console import Console
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.swarm import open_swarm
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm, split_evenly
from swarm_cli.route_words import route_as_json
from swarm_cli.run_async import run_async
from swarm_cli.sample_model import sample_model
from swarm_cli.sampling import GREEDY

SHORT_PROMPT_TOKENS = 8
FIRST_TOKEN_ID, TOKEN_IDS = 20, 100
"""Prompts go through these ids, which every vocabulary has: what they mean does not matter to the time they take."""


class TokenTimes(BaseStreamer):
    """Notes when the tokens of one generation came."""

    def __init__(self) -> None:
        self._started_at_s = perf_counter()
        self._token_ids: list[int] = []
        self._came_at_s: list[float] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self._came_at_s.append(perf_counter())
            self._token_ids += value.tolist()
        self._has_prompt = True

    def end(self) -> None:
        pass

    def measured(self) -> "Measured":
        first, last = self._came_at_s[0], self._came_at_s[-1]
        return Measured(
            tuple(self._token_ids), first - self._started_at_s, (last - first) / max(1, len(self._came_at_s) - 1)
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """One generation."""

    token_ids: tuple[int, ...]
    first_token_s: float
    decode_s_per_token: float


Generate = Callable[[list[int], int], Awaitable[Measured]]
"""Prompt and number of new tokens to what was measured."""


@dataclass(frozen=True, slots=True)
class Result:
    """What the benchmark says."""

    local_tokens_per_s: float
    swarm_tokens_per_s: float
    local_first_token_s: float
    swarm_first_token_s: float
    overhead_per_hop_ms: float
    is_exact: bool
    """Whether all tokens were the local model's."""

    @property
    def decode_ratio(self) -> float:
        return self.swarm_tokens_per_s / self.local_tokens_per_s

    @property
    def first_token_ratio(self) -> float:
        return self.swarm_first_token_s / self.local_first_token_s


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    return run_async(partial(_bench, arguments, Console(stderr=True, highlight=False, soft_wrap=True)))


async def _bench(arguments: argparse.Namespace, console: Console) -> int:
    torch.set_num_threads(arguments.threads)
    model = arguments.model or sample_model()
    async with AsyncExitStack() as stack:
        peers: list[str] = arguments.peers
        if not peers:
            checkpoint = await trio.to_thread.run_sync(open_checkpoint, model)
            spans = split_evenly(checkpoint.num_blocks, arguments.servers)
            console.print(f"Starting {len(spans)} servers, {arguments.threads} torch threads each …")
            plan = LocalSwarmPlan(model, spans, arguments.threads, arguments.dtype or "float32")
            servers = await stack.enter_async_context(local_swarm(plan))
            peers = [address for server in servers for address in server.addresses]
        swarm = await stack.enter_async_context(open_swarm(peers, config=ClientConfig(known_peers_path=None)))
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
        distributed = await swarm.load(model, dtype=dtype)
        local: Any = await trio.to_thread.run_sync(load_local_model, distributed.checkpoint, distributed.shell.dtype)
        async with distributed.session(max_length=2) as session:
            await session.complete(consecutive_tokens(1), **_exactly(1))
            route = session.route
        assert route is not None
        result = await _measure(
            partial(_generate_in_swarm, distributed),
            partial(_generate_locally, local.generate),
            len(route.hops),
            arguments,
            console,
        )
        description = {
            "model": distributed.checkpoint.name,
            "dtype": str(distributed.shell.dtype).removeprefix("torch."),
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "route": route_as_json(route, distributed.servers.known),
        }
    if arguments.json:
        print(json.dumps(description | as_json(result)))
    else:
        Console().print(as_table(result, description, arguments.prompt_tokens))
    return 0


async def _generate_in_swarm(model: DistributedModel, prompt_ids: list[int], num_tokens: int) -> Measured:
    times = TokenTimes()
    async with model.session(max_length=len(prompt_ids) + num_tokens) as session:
        await session.complete(prompt_ids, streamer=times, **_exactly(num_tokens))
    return times.measured()


async def _generate_locally(generate: Callable[..., Any], prompt_ids: list[int], num_tokens: int) -> Measured:
    times = TokenTimes()
    prompt = torch.tensor([prompt_ids])
    await trio.to_thread.run_sync(partial(generate, prompt, streamer=times, **_exactly(num_tokens)))
    return times.measured()


def _exactly(num_tokens: int) -> dict[str, Any]:
    return GREEDY | {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}


async def _measure(
    in_swarm: Generate, locally: Generate, num_hops: int, arguments: argparse.Namespace, console: Console
) -> Result:
    """Swarm and local model in turn, round by round: when the machine speeds up or slows down, it does so for both."""
    short, long = consecutive_tokens(SHORT_PROMPT_TOKENS), consecutive_tokens(arguments.prompt_tokens)
    decoded: dict[Generate, list[Measured]] = {in_swarm: [], locally: []}
    prefilled: dict[Generate, list[Measured]] = {in_swarm: [], locally: []}
    for number in range(arguments.rounds + 1):
        console.print(f"[dim]round {number} of {arguments.rounds}{' (warm-up)' if number == 0 else ''}[/]")
        for generate in (in_swarm, locally):
            decode = await generate(short, arguments.new_tokens)
            prefill = await generate(long, 1)
            if number > 0:
                decoded[generate].append(decode)
                prefilled[generate].append(prefill)
    swarm_s, local_s = (_median_decode_s(decoded[generate]) for generate in (in_swarm, locally))
    outputs = {measured.token_ids for generate in decoded for measured in decoded[generate]}
    return Result(
        local_tokens_per_s=1 / local_s,
        swarm_tokens_per_s=1 / swarm_s,
        local_first_token_s=median(measured.first_token_s for measured in prefilled[locally]),
        swarm_first_token_s=median(measured.first_token_s for measured in prefilled[in_swarm]),
        overhead_per_hop_ms=(swarm_s - local_s) / num_hops * 1000,
        is_exact=len(outputs) == 1,
    )


def consecutive_tokens(num_tokens: int) -> list[int]:
    """A prompt of that many tokens."""
    return [FIRST_TOKEN_ID + index % TOKEN_IDS for index in range(num_tokens)]


def _median_decode_s(rounds: Sequence[Measured]) -> float:
    return median(measured.decode_s_per_token for measured in rounds)


def as_json(result: Result) -> dict[str, Any]:
    """What `--json` prints of the result."""
    return {
        "local_tokens_per_s": round(result.local_tokens_per_s, 2),
        "swarm_tokens_per_s": round(result.swarm_tokens_per_s, 2),
        "decode_ratio": round(result.decode_ratio, 3),
        "local_first_token_s": round(result.local_first_token_s, 4),
        "swarm_first_token_s": round(result.swarm_first_token_s, 4),
        "first_token_ratio": round(result.first_token_ratio, 3),
        "overhead_per_hop_ms": round(result.overhead_per_hop_ms, 3),
        "is_exact": result.is_exact,
    }


def as_table(result: Result, description: dict[str, Any], prompt_tokens: int) -> Table:
    """For people."""
    hops = len(description["route"])
    table = Table(
        title=f"{description['model']}, {description['dtype']}, {hops} hops, {description['threads']} torch threads",
        caption=f"tokens equal to the local model's: {'yes' if result.is_exact else 'NO'}; "
        f"medians of {description['rounds']} rounds",
    )
    for column in ("", "local", "swarm", "swarm : local"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        "decode, tokens/s",
        f"{result.local_tokens_per_s:.1f}",
        f"{result.swarm_tokens_per_s:.1f}",
        f"{result.decode_ratio:.2f}",
    )
    table.add_row(
        f"first token of {prompt_tokens}, s",
        f"{result.local_first_token_s:.3f}",
        f"{result.swarm_first_token_s:.3f}",
        f"{result.first_token_ratio:.2f}",
    )
    table.add_row("overhead a hop, ms", "", f"{result.overhead_per_hop_ms:.2f}", "")
    return table
