"""`swarm bench --stall`: how long does one client wait for its tokens while another's long prompt is taken?

One client decodes all the time; after some quiet tokens another one hands over its prompt (2,000 tokens unless said
otherwise). Compared are the times between the first client's tokens before, and all those of which a part lies within
the time that the other waits for its first token, over all rounds.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import trio
from rich.table import Table

from p2pswarm.client.generation import GeneratingSession
from p2pswarm.core.errors import ConfigError
from swarm_cli.benchmarks.generating import (
    SHORT_PROMPT_TOKENS,
    exactly,
    generate_in_swarm,
    generate_locally,
    make_prompt,
)
from swarm_cli.benchmarks.setting import Setting

DEFAULT_PROMPT_TOKENS = 2000
MAX_DECODED_TOKENS = 2000
"""Of the client that decodes: enough for a prefill of two minutes."""
NOT_COUNTED = 4
"""First tokens: its own prompt's, and those that servers prepare themselves with."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """Times between tokens, in seconds."""

    gaps_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return median(self.gaps_s)

    @property
    def p95_s(self) -> float:
        """Nineteen of twenty are not longer."""
        return sorted(self.gaps_s)[math.ceil(0.95 * len(self.gaps_s)) - 1]

    @property
    def max_s(self) -> float:
        return max(self.gaps_s)


@dataclass(frozen=True, slots=True)
class StallReport:
    """What the benchmark says."""

    quiet: Gaps
    stalled: Gaps
    alone_first_token_s: float
    """Of the long prompt, while nobody else decodes."""
    first_token_s: float
    """While somebody does."""
    prompt_tokens: int
    rounds: int
    is_exact: bool

    def as_json(self) -> dict[str, Any]:
        quiet, stalled = self.quiet, self.stalled
        return {
            "prompt_tokens": self.prompt_tokens,
            "quiet_s": {"median": quiet.median_s, "p95": quiet.p95_s, "max": quiet.max_s, "count": len(quiet.gaps_s)},
            "stalled_s": {
                "median": stalled.median_s,
                "p95": stalled.p95_s,
                "max": stalled.max_s,
                "count": len(stalled.gaps_s),
            },
            "over_quiet_median": {name: round(ratio, 3) for name, ratio in self.ratios.items()},
            "first_token_alone_s": self.alone_first_token_s,
            "first_token_s": self.first_token_s,
            "is_exact": self.is_exact,
            "rounds": self.rounds,
        }

    @property
    def ratios(self) -> dict[str, float]:
        """The times while the prompt is taken, in multiples of the quiet median."""
        stalled = self.stalled
        named = {"median": stalled.median_s, "p95": stalled.p95_s, "max": stalled.max_s}
        return {name: value_s / self.quiet.median_s for name, value_s in named.items()}

    def as_table(self) -> Table:
        table = Table(
            caption=f"first token of the long prompt after {self.first_token_s:.1f} s, with nobody else "
            f"{self.alone_first_token_s:.1f} s; tokens equal to the local model's: {'yes' if self.is_exact else 'NO'}; "
            f"{self.rounds} rounds, {len(self.quiet.gaps_s)} and {len(self.stalled.gaps_s)} tokens",
        )
        during = f"while {self.prompt_tokens} tokens are taken"
        for column in ("ms between tokens", "quiet", during, ": quiet median"):
            table.add_column(column, justify="right" if column != "ms between tokens" else "left")
        for name, quiet_s, stalled_s in (
            ("median", self.quiet.median_s, self.stalled.median_s),
            ("95 of 100 below", self.quiet.p95_s, self.stalled.p95_s),
            ("longest", self.quiet.max_s, self.stalled.max_s),
        ):
            ratio = stalled_s / self.quiet.median_s
            table.add_row(name, f"{1000 * quiet_s:.1f}", f"{1000 * stalled_s:.1f}", f"{ratio:.2f}")
        return table


@dataclass(frozen=True, slots=True)
class StalledRound:
    """One client's tokens, and when the other's prompt was under way."""

    came_at_s: list[float]
    token_ids: list[int]
    prefill_began_s: float
    prefill_ended_s: float
    prefill_token_id: int


async def measure(setting: Setting, arguments: argparse.Namespace) -> StallReport:
    """Rounds of a quiet and a disturbed stretch of one and the same session."""
    prompt_tokens = arguments.prompt_tokens or DEFAULT_PROMPT_TOKENS
    if prompt_tokens >= setting.max_length:
        raise ConfigError(
            f"these servers take sessions of {setting.max_length} tokens, no --prompt-tokens {prompt_tokens}"
        )
    long_prompt = make_prompt(prompt_tokens, 1)
    setting.say_round(0, arguments.rounds)
    alone = await generate_in_swarm(setting.model, long_prompt, 1)
    rounds = []
    for number in range(1, arguments.rounds + 1):
        setting.say_round(number, arguments.rounds)
        rounds.append(await _stalled_round(setting, long_prompt, arguments.new_tokens))
    return StallReport(
        quiet=Gaps(tuple(gap for one in rounds for gap in quiet_gaps_s(one))),
        stalled=Gaps(tuple(gap for one in rounds for gap in stalled_gaps_s(one))),
        alone_first_token_s=alone.first_token_s,
        first_token_s=median(one.prefill_ended_s - one.prefill_began_s for one in rounds),
        prompt_tokens=prompt_tokens,
        rounds=arguments.rounds,
        is_exact=await _are_exact(setting, long_prompt, rounds),
    )


async def _stalled_round(setting: Setting, long_prompt: list[int], quiet_tokens: int) -> StalledRound:
    num_tokens = min(MAX_DECODED_TOKENS, setting.max_length - SHORT_PROMPT_TOKENS)
    times = Arrivals()
    async with (
        setting.model.session(max_length=SHORT_PROMPT_TOKENS + num_tokens) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(_decode, session, num_tokens, times)
        await times.until(NOT_COUNTED + quiet_tokens)
        began_s = perf_counter()
        prefill = await generate_in_swarm(setting.model, long_prompt, 1)
        ended_s = perf_counter()
        await times.until(len(times.token_ids) + 1)
        nursery.cancel_scope.cancel()
    return StalledRound(times.came_at_s, times.token_ids, began_s, ended_s, prefill.token_ids[0])


class Arrivals:
    """The tokens of the client that decodes, as they come."""

    def __init__(self) -> None:
        self.came_at_s: list[float] = []
        self.token_ids: list[int] = []
        self.is_over = False
        self._waiting = trio.lowlevel.ParkingLot()

    def note(self, token_id: int) -> None:
        self.came_at_s.append(perf_counter())
        self.token_ids.append(token_id)
        self._waiting.unpark_all()

    def end(self) -> None:
        self.is_over = True
        self._waiting.unpark_all()

    async def until(self, num_tokens: int) -> None:
        """Returns when so many have come, or no more will."""
        while len(self.token_ids) < num_tokens and not self.is_over:
            await self._waiting.park()


async def _decode(session: GeneratingSession, num_tokens: int, times: Arrivals) -> None:
    async with session.generate(make_prompt(SHORT_PROMPT_TOKENS), **exactly(num_tokens)) as token_ids:
        async for token_id in token_ids:
            times.note(token_id)
    times.end()


def quiet_gaps_s(one: StalledRound) -> list[float]:
    """Between tokens that came before the long prompt was handed over."""
    pairs = itertools.pairwise(one.came_at_s[NOT_COUNTED:])
    return [later - earlier for earlier, later in pairs if later <= one.prefill_began_s]


def stalled_gaps_s(one: StalledRound) -> list[float]:
    """Between tokens of which the later came after that, and the earlier before the other's first token."""
    pairs = itertools.pairwise(one.came_at_s)
    return [
        later - earlier for earlier, later in pairs if later > one.prefill_began_s and earlier < one.prefill_ended_s
    ]


async def _are_exact(setting: Setting, long_prompt: list[int], rounds: Sequence[StalledRound]) -> bool:
    setting.console.print("[dim]the local model[/]")
    longest = max(len(one.token_ids) for one in rounds)
    decoded = await generate_locally(setting.local.generate, make_prompt(SHORT_PROMPT_TOKENS), longest)
    prefilled = await generate_locally(setting.local.generate, long_prompt, 1)
    return all(
        tuple(one.token_ids) == decoded.token_ids[: len(one.token_ids)]
        and one.prefill_token_id == prefilled.token_ids[0]
        for one in rounds
    )
