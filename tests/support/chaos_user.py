"""One who uses a session in every way there is, and knows what each answer must be.

`Truth` computes answers from the whole text each time, so that it has no caches that could be wrong too.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import trio

from p2pswarm.client.session import Session
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.span import Span
from p2pswarm.testing.arithmetic_model import MODULUS, Tokens, run_blocks

MAX_BATCH_SIZE = 3
LONGEST_PREFILL = 24
LONGEST_PAUSE_S = 2.0


class ArithmeticTruth:
    """The text of one session over the arithmetic model."""

    def __init__(self, num_blocks: int) -> None:
        self._blocks = Span(0, num_blocks)
        self._text = Tokens.none(1)

    def answer(self, step: StepInput) -> torch.Tensor:
        """What the session must answer; the step is part of the text from then on."""
        kept = self._text.cropped(step.position) if step.position else Tokens.none(step.batch_size)
        if step.beam_indices is not None:
            kept = kept.reordered(step.beam_indices)
        self._text = kept.followed_by(step.hidden_states, step.attention_mask, step.position_ids)
        return run_blocks(self._blocks, self._text)[:, step.position :]

    def new_tokens(self, randomness: random.Random, batch_size: int, num_tokens: int) -> torch.Tensor:
        values = [randomness.randrange(MODULUS) for _ in range(batch_size * num_tokens)]
        return torch.tensor(values, dtype=torch.float32).view(batch_size, num_tokens, 1)


class LlamaTruth:
    """The text of one session over a tiny llama, computed by the whole model in this process."""

    def __init__(self, local: Any) -> None:
        self._local = local
        self._inputs = torch.empty(1, 0, local.config.hidden_size)

    def answer(self, step: StepInput) -> torch.Tensor:
        kept = self._inputs[:, : step.position] if step.position else self._inputs.new_empty(step.batch_size, 0, 64)
        if step.beam_indices is not None:
            kept = kept[step.beam_indices]
        self._inputs = torch.cat([kept, step.hidden_states], dim=1)
        if step.num_tokens == 0:
            return step.hidden_states
        return blocks_of(self._local, self._inputs)[:, step.position :]

    def new_tokens(self, randomness: random.Random, batch_size: int, num_tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(randomness.randrange(1 << 30))
        return torch.randn(batch_size, num_tokens, self._inputs.shape[2], generator=generator)


@torch.inference_mode()
def blocks_of(local: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The last block's output, before the final norm."""
    taken = []
    hook = local.model.norm.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    local(inputs_embeds=hidden_states, use_cache=False)
    hook.remove()
    return taken[0]


class User:
    """Makes steps drawn at random, one after the other, and holds the answers against the truth."""

    def __init__(
        self,
        session: Session,
        truth: Any,
        randomness: random.Random,
        note: Callable[[str], None] = lambda event: None,
        *,
        with_padding: bool = True,
    ) -> None:
        self.num_steps = 0
        self.longest_step_s = 0.0
        self._session = session
        self._truth = truth
        self._random = randomness
        self._note = note
        self._with_padding = with_padding
        self._batch_size = 1
        self._position = 0

    async def use(self, num_steps: int) -> None:
        """Raises what the session raises, and `AssertionError` for a wrong answer."""
        for _ in range(num_steps):
            await trio.sleep(self._random.uniform(0, LONGEST_PAUSE_S))
            await self.make(self._next_step())

    async def say(self, num_tokens: int = 1) -> None:
        """So many new tokens."""
        await self.make(self._step_of(num_tokens))

    def go_back(self, position: int) -> None:
        """Forgets what came after."""
        self._position = self._session.position = position

    async def make(self, step: StepInput) -> None:
        """One step, held against the truth."""
        self._note(
            f"step {self.num_steps}: {step.num_tokens} tokens of {step.batch_size} rows from {step.position} on"
            f"{'' if step.beam_indices is None else f', beams {step.beam_indices.tolist()}'}"
        )
        began_s = trio.current_time()
        got = await self._session.step(step)
        self.longest_step_s = max(self.longest_step_s, trio.current_time() - began_s)
        torch.testing.assert_close(got, self._truth.answer(step), rtol=1e-4, atol=1e-4)
        self.num_steps += 1
        self._batch_size, self._position = step.batch_size, step.end
        assert self._session.position == step.end

    def _next_step(self) -> StepInput:
        chance, room = self._random.random(), self._session.max_length - self._position
        if chance < 0.03 or room == 0:
            self._batch_size, self._position = self._random.randint(1, MAX_BATCH_SIZE), 0
        elif chance < 0.1 and self._position:
            self._position = self._random.randrange(1, self._position + 1)
        if self._random.random() < 0.5:
            self._session.position = self._position  # else the step says so
        num_tokens = self._random.choice([0, *[1] * 15, self._random.randint(2, LONGEST_PREFILL)])
        if self._position == 0:
            num_tokens = max(1, num_tokens)
        return self._with_extras(self._step_of(min(num_tokens, self._session.max_length - self._position)))

    def _step_of(self, num_tokens: int) -> StepInput:
        return StepInput(self._truth.new_tokens(self._random, self._batch_size, num_tokens), self._position)

    def _with_extras(self, step: StepInput) -> StepInput:
        """At times with other beams, or with padding."""
        if step.batch_size > 1 and step.position and self._random.random() < 0.3:
            beams = [self._random.randrange(step.batch_size) for _ in range(step.batch_size)]
            step = replace(step, beam_indices=torch.tensor(beams))
        if self._with_padding and step.num_tokens and self._random.random() < 0.1:
            chances = torch.tensor([[self._random.random() for _ in range(step.num_tokens)]] * step.batch_size)
            position_ids = torch.arange(step.position, step.end) + torch.arange(step.batch_size)[:, None]
            step = replace(step, attention_mask=chances < 0.7, position_ids=position_ids)
        return step
