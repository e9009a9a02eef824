"""`swarm bench --training`: does a swarm take batches forward, and their gradients back, as fast as the local model?

What is measured, in tokens/s of a batch, each the median over the rounds, after one round that does not count:

- forward: logits and loss, with no gradients wanted;
- forward and backward: the same, and the gradients of the loss for the embeddings of all tokens, which is what prompt
  tuning and what stands before the blocks need: they go back through every block.

Both models do the same by the same code; loss and gradients are compared. The local model runs in this process with as
many torch threads as each server has, in the same dtype, frozen, while the servers have nothing to do, and the other
way round. Servers keep nothing of a forward pass, so a backward pass there begins with another forward pass, which the
local model does not need; on the other hand, the parts of a batch pass through different servers at the same time.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
import trio
from rich.table import Table

from swarm_cli.benchmarks.generating import make_prompt
from swarm_cli.benchmarks.setting import Setting

DEFAULT_BATCH = (8, 128)
"""Rows, and tokens of each."""
MAX_GRADIENT_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.05}
"""Relative, over all of a batch: what rounding in that dtype makes, and no more."""


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One batch forward and back."""

    forward_s: float
    """Of a forward pass by itself, before the other one."""
    both_s: float
    """Of a forward pass with gradients wanted, and the backward pass."""
    loss: float
    gradients: torch.Tensor
    """[rows, tokens, hidden], of the loss for the embeddings."""


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What the benchmark says."""

    rows: int
    tokens_per_row: int
    local_forward_s: float
    swarm_forward_s: float
    local_both_s: float
    swarm_both_s: float
    gradient_difference: float
    """The largest relative one of all rounds."""
    loss_difference: float
    are_equal: bool
    """Whether the gradients differ by no more than the dtype explains."""
    rounds: int

    @property
    def num_tokens(self) -> int:
        return self.rows * self.tokens_per_row

    @property
    def forward_ratio(self) -> float:
        return self.local_forward_s / self.swarm_forward_s

    @property
    def both_ratio(self) -> float:
        return self.local_both_s / self.swarm_both_s

    def as_json(self) -> dict[str, Any]:
        return {
            "batch": [self.rows, self.tokens_per_row],
            "local_forward_tokens_per_s": round(self.num_tokens / self.local_forward_s, 2),
            "swarm_forward_tokens_per_s": round(self.num_tokens / self.swarm_forward_s, 2),
            "forward_ratio": round(self.forward_ratio, 3),
            "local_forward_backward_tokens_per_s": round(self.num_tokens / self.local_both_s, 2),
            "swarm_forward_backward_tokens_per_s": round(self.num_tokens / self.swarm_both_s, 2),
            "forward_backward_ratio": round(self.both_ratio, 3),
            "gradient_difference": self.gradient_difference,
            "loss_difference": self.loss_difference,
            "are_equal": self.are_equal,
            "rounds": self.rounds,
        }

    def as_table(self) -> Table:
        table = Table(
            caption=f"gradients equal to the local model's: {'yes' if self.are_equal else 'NO'} "
            f"(relative difference {self.gradient_difference:.1e}); medians of {self.rounds} rounds",
        )
        batch = f"batch {self.rows}x{self.tokens_per_row}, tokens/s"
        for column in (batch, "local", "swarm", "swarm : local"):
            table.add_column(column, justify="left" if column == batch else "right")
        for name, local_s, swarm_s, ratio in (
            ("forward", self.local_forward_s, self.swarm_forward_s, self.forward_ratio),
            ("forward and backward", self.local_both_s, self.swarm_both_s, self.both_ratio),
        ):
            table.add_row(name, f"{self.num_tokens / local_s:.1f}", f"{self.num_tokens / swarm_s:.1f}", f"{ratio:.2f}")
        return table


async def measure(setting: Setting, arguments: argparse.Namespace) -> TrainingReport:
    """Swarm and local model in turn, round by round: when the machine speeds up or slows down, it does so for both."""
    rows, tokens_per_row = arguments.batch or DEFAULT_BATCH
    token_ids = torch.tensor([make_prompt(tokens_per_row, number) for number in range(rows)])
    in_swarm: list[Pass] = []
    locally: list[Pass] = []
    for number in range(arguments.rounds + 1):
        setting.say_round(number, arguments.rounds)
        for model, passes in ((setting.model.shell, in_swarm), (setting.local, locally)):
            done = await trio.to_thread.run_sync(partial(forward_and_back, model, token_ids))
            if number > 0:
                passes.append(done)
    return summarize(in_swarm, locally, setting.dtype)


def forward_and_back(model: Any, token_ids: torch.Tensor) -> Pass:
    """By a model whose parameters are frozen, whole or over a swarm."""
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()(token_ids).detach()
    call = partial(model, inputs_embeds=embeddings, labels=token_ids, use_cache=False)
    started_at_s = perf_counter()
    with torch.no_grad():
        call()
    forward_ended_at_s = perf_counter()
    embeddings.requires_grad_()
    loss = call().loss
    loss.backward()
    both_s = perf_counter() - forward_ended_at_s
    assert embeddings.grad is not None
    return Pass(forward_ended_at_s - started_at_s, both_s, loss.item(), embeddings.grad)


def summarize(in_swarm: list[Pass], locally: list[Pass], dtype: str) -> TrainingReport:
    """Medians, and how much the passes differ."""
    expected = locally[0]
    difference = max(_relative_difference(done.gradients, expected.gradients) for done in in_swarm)
    rows, tokens_per_row, _ = expected.gradients.shape
    return TrainingReport(
        rows=rows,
        tokens_per_row=tokens_per_row,
        local_forward_s=median(done.forward_s for done in locally),
        swarm_forward_s=median(done.forward_s for done in in_swarm),
        local_both_s=median(done.both_s for done in locally),
        swarm_both_s=median(done.both_s for done in in_swarm),
        gradient_difference=difference,
        loss_difference=max(abs(done.loss - expected.loss) for done in in_swarm),
        are_equal=difference <= MAX_GRADIENT_DIFFERENCE[dtype],
        rounds=len(in_swarm),
    )


def _relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())
