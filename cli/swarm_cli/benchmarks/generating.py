"""One generation of the benchmarks: prompts that are all different, greedy tokens, and when each of them came."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
import trio
from transformers.generation.streamers import BaseStreamer

from p2pswarm.client.distributed_model import DistributedModel
from swarm_cli.sampling import GREEDY

SHORT_PROMPT_TOKENS = 8
FIRST_TOKEN_ID, NUM_TOKEN_IDS = 20, 100
"""Prompts go through these ids, which every vocabulary has: what they mean does not matter to the time they take."""
PROMPT_STRIDE = 7
"""How much later in them each further prompt begins."""


class TokenTimes(BaseStreamer):
    """Notes when the tokens of one generation came."""

    def __init__(self) -> None:
        self._started_at_s = perf_counter()
        self._has_prompt = False
        self.token_ids: list[int] = []
        self.came_at_s: list[float] = []
        """By `time.perf_counter`."""

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self.came_at_s.append(perf_counter())
            self.token_ids += value.tolist()
        self._has_prompt = True

    def end(self) -> None:
        pass

    def measured(self) -> "Measured":
        first, last = self.came_at_s[0], self.came_at_s[-1]
        return Measured(
            tuple(self.token_ids), first - self._started_at_s, (last - first) / max(1, len(self.came_at_s) - 1)
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """One generation."""

    token_ids: tuple[int, ...]
    first_token_s: float
    decode_s_per_token: float


Generate = Callable[[list[int], int], Awaitable[Measured]]
"""Prompt and number of new tokens to what was measured."""


def make_prompt(num_tokens: int, number: int = 0) -> list[int]:
    """A prompt of that many tokens; another one for each number."""
    start = number * PROMPT_STRIDE
    return [FIRST_TOKEN_ID + (start + index) % NUM_TOKEN_IDS for index in range(num_tokens)]


def exactly(num_tokens: int) -> dict[str, Any]:
    """Options of `generate` for so many tokens, each the likeliest.

    No token ends the text. (`min_new_tokens` would do it too, at 1.5 ms a token for looking through the vocabulary.)
    """
    return GREEDY | {"max_new_tokens": num_tokens, "eos_token_id": None}


async def generate_in_swarm(model: DistributedModel, prompt_ids: list[int], num_tokens: int) -> Measured:
    """In a session of its own; opening it counts."""
    times = TokenTimes()
    async with model.session(max_length=len(prompt_ids) + num_tokens) as session:
        await session.complete(prompt_ids, streamer=times, **exactly(num_tokens))
    return times.measured()


async def generate_locally(generate: Callable[..., Any], prompt_ids: list[int], num_tokens: int) -> Measured:
    """By the `generate` of a model that is whole, in a thread."""
    times = TokenTimes()
    prompt = torch.tensor([prompt_ids])
    await trio.to_thread.run_sync(partial(generate, prompt, streamer=times, **exactly(num_tokens)))
    return times.measured()
