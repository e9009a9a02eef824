"""`swarm bench --greedy`: what is left of a client's speed while one peer sends forward calls without pause, or trains
without pause (`--greedy backward`)?

The greedy peer has an identity of its own and keeps several batches of hidden states in work, each through all blocks;
where it trains, each goes back through them as well before the next one comes. Quiet and disturbed rounds take turns;
decode speeds are medians after one round that does not count.
"""

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
import trio
from rich.table import Table

from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.swarm import open_swarm
from p2pswarm.core.errors import NetworkError, RemoteError, ServerBusy, SwarmError
from swarm_cli.benchmarks.generating import (
    SHORT_PROMPT_TOKENS,
    Measured,
    generate_in_swarm,
    generate_locally,
    make_prompt,
)
from swarm_cli.benchmarks.setting import Setting, client_config

BATCHES_IN_WORK = 4
"""More than there are servers in the usual run, so that each always has one waiting."""
TOKENS_PER_BATCH = 128
SETTLE_S = 1.0
"""After the last call was given up, before a quiet round: what a server is in the middle of, it finishes."""
FIRST_ANSWER_TIMEOUT_S = 60.0
REFUSED_PAUSE_S = 0.1
"""Between a refusal and the next try, or this process would do nothing else."""


@dataclass(frozen=True, slots=True)
class GreedyReport:
    """What the benchmark says."""

    quiet_tokens_per_s: float
    disturbed_tokens_per_s: float
    greedy_tokens_per_s: float
    """Through all blocks, of batches that were done meanwhile."""
    num_refused: int
    is_exact: bool
    rounds: int
    trains: bool = False

    @property
    def share_kept(self) -> float:
        return self.disturbed_tokens_per_s / self.quiet_tokens_per_s

    def as_json(self) -> dict[str, Any]:
        return {
            "quiet_tokens_per_s": round(self.quiet_tokens_per_s, 2),
            "disturbed_tokens_per_s": round(self.disturbed_tokens_per_s, 2),
            "share_kept": round(self.share_kept, 3),
            "greedy_tokens_per_s": round(self.greedy_tokens_per_s, 1),
            "greedy_calls": "forward and backward" if self.trains else "forward",
            "greedy_calls_refused": self.num_refused,
            "is_exact": self.is_exact,
            "rounds": self.rounds,
        }

    def as_table(self) -> Table:
        table = Table(
            caption=f"the greedy peer had {BATCHES_IN_WORK} batches of {TOKENS_PER_BATCH} tokens in work, "
            f"{self.num_refused} were refused; tokens equal to the local model's: {'yes' if self.is_exact else 'NO'}; "
            f"medians of {self.rounds} rounds",
        )
        for column in ("tokens/s", "quiet", "beside a greedy peer", "share kept"):
            table.add_column(column, justify="left" if column == "tokens/s" else "right")
        table.add_row(
            "decode",
            f"{self.quiet_tokens_per_s:.1f}",
            f"{self.disturbed_tokens_per_s:.1f}",
            f"{self.share_kept:.2f}",
        )
        its_batches = f"the greedy peer's batches, forward{' and backward' if self.trains else ''}"
        table.add_row(its_batches, "", f"{self.greedy_tokens_per_s:.0f}", "")
        return table


class GreedyPeer:
    """Keeps batches in work for as long as `at_work` lasts; if it `trains`, there and back."""

    def __init__(self, model: DistributedModel, *, trains: bool) -> None:
        self._training = model.dispatch.forward_pass.training
        self._trains = trains
        hidden_size = model.servers.facts.hidden_size
        generator = torch.Generator().manual_seed(0)
        self._batch = torch.randn(1, TOKENS_PER_BATCH, hidden_size, generator=generator).to(model.shell.dtype)
        self._worked_s = 0.0
        self._num_tokens = 0
        self._has_answer = trio.Event()
        self._num_answered = 0
        self.num_refused = 0

    @property
    def tokens_per_s(self) -> float:
        return self._num_tokens / self._worked_s if self._worked_s else 0.0

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Within, servers have its calls, and have answered one; they are given up at the end. Raises `ServerBusy`."""
        self._has_answer = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(BATCHES_IN_WORK):
                nursery.start_soon(self._call_for_ever)
            with trio.move_on_after(FIRST_ANSWER_TIMEOUT_S):
                await self._has_answer.wait()
            if not self._has_answer.is_set():
                raise ServerBusy(f"no batch was done within {FIRST_ANSWER_TIMEOUT_S:g} s")
            num_before, began_at_s = self._num_answered, perf_counter()
            yield
            self._num_tokens += (self._num_answered - num_before) * TOKENS_PER_BATCH
            self._worked_s += perf_counter() - began_at_s
            nursery.cancel_scope.cancel()
        await trio.sleep(SETTLE_S)

    async def _call_for_ever(self) -> None:
        while True:
            try:
                await self._run_batch()
                self._num_answered += 1
                self._has_answer.set()
            except (RemoteError, NetworkError, SwarmError):
                self.num_refused += 1
                await trio.sleep(REFUSED_PAUSE_S)

    async def _run_batch(self) -> None:
        output, trail = await self._training.forward(StepInput(self._batch, 0), keeps_trail=self._trains)
        if self._trains:
            await self._training.backward(trail, torch.ones_like(output))


async def measure(setting: Setting, arguments: argparse.Namespace) -> GreedyReport:
    """Decodes in turn with and without the greedy peer."""
    prompt = make_prompt(SHORT_PROMPT_TOKENS)
    quiet: list[Measured] = []
    disturbed: list[Measured] = []
    async with open_swarm(setting.peers, config=client_config()) as swarm:
        trains = arguments.greedy == "backward"
        greedy = GreedyPeer(await swarm.load(setting.model_path, dtype=setting.model.shell.dtype), trains=trains)
        for number in range(arguments.rounds + 1):
            setting.say_round(number, arguments.rounds)
            quiet.append(await generate_in_swarm(setting.model, prompt, arguments.new_tokens))
            async with greedy.at_work():
                disturbed.append(await generate_in_swarm(setting.model, prompt, arguments.new_tokens))
    setting.console.print("[dim]the local model[/]")
    local = await generate_locally(setting.local.generate, prompt, arguments.new_tokens)
    return GreedyReport(
        quiet_tokens_per_s=1 / median(one.decode_s_per_token for one in quiet[1:]),
        disturbed_tokens_per_s=1 / median(one.decode_s_per_token for one in disturbed[1:]),
        greedy_tokens_per_s=greedy.tokens_per_s,
        num_refused=greedy.num_refused,
        is_exact=all(one.token_ids == local.token_ids for one in [*quiet, *disturbed]),
        rounds=arguments.rounds,
        trains=trains,
    )
