"""`swarm bench`: is a swarm as fast as the local model? Both measured in one run, by the same `generate`, in turn.

What is measured, each the median over the rounds, after one round that does not count:

- decode tokens/s: tokens after the first over the time they took, from a short prompt, greedy;
- time to first token: from handing over a long prompt until the first token, opening the session included;
- overhead a hop: (swarm's ms a token - local ms a token) / hops.

The local model runs in this process with as many torch threads as each server has, in the same dtype, while the servers
have nothing to do, and the other way round.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from rich.table import Table

from swarm_cli.benchmarks.generating import (
    SHORT_PROMPT_TOKENS,
    Generate,
    Measured,
    generate_in_swarm,
    generate_locally,
    make_prompt,
)
from swarm_cli.benchmarks.setting import Setting

DEFAULT_PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class OneClientReport:
    """What the benchmark says."""

    local_tokens_per_s: float
    swarm_tokens_per_s: float
    local_first_token_s: float
    swarm_first_token_s: float
    overhead_per_hop_ms: float
    is_exact: bool
    """Whether all tokens were the local model's."""
    rounds: int
    prompt_tokens: int

    @property
    def decode_ratio(self) -> float:
        return self.swarm_tokens_per_s / self.local_tokens_per_s

    @property
    def first_token_ratio(self) -> float:
        return self.swarm_first_token_s / self.local_first_token_s

    def as_json(self) -> dict[str, Any]:
        return {
            "local_tokens_per_s": round(self.local_tokens_per_s, 2),
            "swarm_tokens_per_s": round(self.swarm_tokens_per_s, 2),
            "decode_ratio": round(self.decode_ratio, 3),
            "local_first_token_s": round(self.local_first_token_s, 4),
            "swarm_first_token_s": round(self.swarm_first_token_s, 4),
            "first_token_ratio": round(self.first_token_ratio, 3),
            "overhead_per_hop_ms": round(self.overhead_per_hop_ms, 3),
            "is_exact": self.is_exact,
            "rounds": self.rounds,
        }

    def as_table(self) -> Table:
        table = Table(
            caption=f"tokens equal to the local model's: {'yes' if self.is_exact else 'NO'}; "
            f"medians of {self.rounds} rounds",
        )
        for column in ("", "local", "swarm", "swarm : local"):
            table.add_column(column, justify="right" if column else "left")
        table.add_row(
            "decode, tokens/s",
            f"{self.local_tokens_per_s:.1f}",
            f"{self.swarm_tokens_per_s:.1f}",
            f"{self.decode_ratio:.2f}",
        )
        table.add_row(
            f"first token of {self.prompt_tokens}, s",
            f"{self.local_first_token_s:.3f}",
            f"{self.swarm_first_token_s:.3f}",
            f"{self.first_token_ratio:.2f}",
        )
        table.add_row("overhead a hop, ms", "", f"{self.overhead_per_hop_ms:.2f}", "")
        return table


async def measure(setting: Setting, arguments: argparse.Namespace) -> OneClientReport:
    """Swarm and local model in turn, round by round: when the machine speeds up or slows down, it does so for both."""
    prompt_tokens = arguments.prompt_tokens or DEFAULT_PROMPT_TOKENS
    short, long = make_prompt(SHORT_PROMPT_TOKENS), make_prompt(prompt_tokens)
    in_swarm: Generate = partial(generate_in_swarm, setting.model)
    locally: Generate = partial(generate_locally, setting.local.generate)
    decoded: dict[Generate, list[Measured]] = {in_swarm: [], locally: []}
    prefilled: dict[Generate, list[Measured]] = {in_swarm: [], locally: []}
    for number in range(arguments.rounds + 1):
        setting.say_round(number, arguments.rounds)
        for generate in (in_swarm, locally):
            decode = await generate(short, arguments.new_tokens)
            prefill = await generate(long, 1)
            if number > 0:
                decoded[generate].append(decode)
                prefilled[generate].append(prefill)
    swarm_s, local_s = (_median_decode_s(decoded[generate]) for generate in (in_swarm, locally))
    outputs = {measured.token_ids for generate in decoded for measured in decoded[generate]}
    first_tokens = {measured.token_ids for generate in prefilled for measured in prefilled[generate]}
    return OneClientReport(
        local_tokens_per_s=1 / local_s,
        swarm_tokens_per_s=1 / swarm_s,
        local_first_token_s=median(measured.first_token_s for measured in prefilled[locally]),
        swarm_first_token_s=median(measured.first_token_s for measured in prefilled[in_swarm]),
        overhead_per_hop_ms=(swarm_s - local_s) / len(setting.route) * 1000,
        is_exact=len(outputs) == 1 and len(first_tokens) == 1,
        rounds=arguments.rounds,
        prompt_tokens=prompt_tokens,
    )


def _median_decode_s(rounds: Sequence[Measured]) -> float:
    return median(measured.decode_s_per_token for measured in rounds)
