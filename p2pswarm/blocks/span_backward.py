"""Gradients back through a span's blocks, whose own weights stay as they are.

What a block's gradient needs, its *notes*, are many times what enters it: a token's are 14 times its hidden state in
SmolLM2, 7 to 32 times in the tests' other decoders; while the block goes back it takes 25 times, for a moment. Where
attention notes a number for each pair of tokens (Gemma 2, BLOOM, Falcon, gpt-oss) they grow with the square of the
tokens. So only the last `num_noted` blocks note while rows pass them for the first time; of those before them what
enters is kept, and each runs once more, noting, when its turn to go back has come. Memory holds what enters each block,
and the notes of `num_noted` blocks at the most.

A block with notes takes 1.03 times as long as without, back 1.1 to 1.4 times. Ten blocks of SmolLM2, 256 tokens, one
thread of a 2.4 GHz EPYC, processor time: forward 233 ms, back with one block noted at a time 721, with five 625, with
all ten 504.

Between any two stages the device may do something else. Rows do not depend on one another: who has less memory takes
fewer at a time. What blocks are called with beside hidden states (masks, rotary embeddings) comes from the caller, as
`SpanModel` collects it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.blocks.span_block import BlockCall
from p2pswarm.blocks.tuned_layers import TunedLayers
from p2pswarm.blocks.tuning import SpanTuning


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """How a loss changes with what went through a span."""

    inputs: torch.Tensor
    """[batch, tokens, hidden], in the span's dtype"""
    tuning: SpanTuning | None
    """With the blocks, prompts and layers of the tuning they are for, in float32."""


def run_blocks(
    blocks: Iterable[nn.Module],
    calls: Sequence[BlockCall],
    states: torch.Tensor,
    prompts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The hidden states after the last of the blocks. `prompts: [blocks, tokens, hidden]` are added as they enter."""
    for place, (block, (arguments, named)) in enumerate(zip(blocks, calls, strict=True)):
        if prompts is not None:
            states = _entering(states, prompts[place])
        output = block(states, *arguments, **named)
        states = output[0] if isinstance(output, tuple) else output
    return states


def num_stages(num_blocks: int, num_noted: int) -> int:
    """How many stages a round trip takes: a block forward or back is one. They take about as long as one another."""
    return 3 * num_blocks - num_noted


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """What rows go through."""

    blocks: Mapping[int, nn.Module]
    """In order."""
    calls: Sequence[BlockCall]
    """Of each block."""
    tuning: SpanTuning | None
    """Of just these blocks."""
    tuned_layers: TunedLayers
    choose_adapter: Callable[[], None]
    """To be called whenever something else may have run."""


class RoundTrip:
    """Some rows there and back. `go_on` until `is_done`; where it is dropped before, nothing is left behind.

    Used by one thread at a time.
    """

    def __init__(self, way: Way, states: torch.Tensor, grad_outputs: torch.Tensor, num_noted: int) -> None:
        """`grad_outputs` are those of `run_blocks` with the tuning applied. No tensor may be of inference mode."""
        num_blocks, tuning = len(way.blocks), way.tuning
        assert 1 <= num_noted <= num_blocks
        self._way = way
        self._indices, self._blocks = tuple(way.blocks), tuple(way.blocks.values())
        prompts = None if tuning is None else tuning.prompts_at(0, states.shape[1])
        self._prompts = [None] * num_blocks if prompts is None else list(prompts)
        self._first_noted = num_blocks - num_noted
        """The place of the block from which on they note the first time."""
        self._arriving: torch.Tensor | None = states
        """What comes to the next block; None on the way back."""
        self._entered: list[torch.Tensor] = []
        """What came to each block that is to run once more."""
        self._noted: list[_Noted] = []
        """The blocks after those that have not gone back."""
        self._gradients = grad_outputs
        self._of_prompts = None if tuning is None or tuning.prompts is None else torch.zeros_like(tuning.prompts)
        self._of_layers: dict[int, Mapping[str, LowRank]] = {}

    @property
    def is_done(self) -> bool:
        return self._arriving is None and not self._entered and not self._noted

    @property
    def gradients(self) -> Gradients:
        """Once it is done."""
        assert self.is_done
        tuning = self._way.tuning
        of_tuning = None if tuning is None else SpanTuning(tuning.blocks, self._of_prompts, self._of_layers)
        return Gradients(self._gradients, of_tuning)

    def go_on(self, stages: int) -> None:
        """Takes the next stages, of which there must be so many left."""
        self._way.choose_adapter()
        with torch.inference_mode(False), torch.no_grad():
            for _ in range(stages):
                self._take_stage()

    def _take_stage(self) -> None:
        place = len(self._entered) + len(self._noted)
        if self._arriving is not None:
            states, self._arriving = self._arriving, None
            if place < self._first_noted:
                self._entered.append(states)
                self._arriving = self._pass(place, states, self._pairs(place))
            else:
                output = self._note(place, states)
                self._arriving = None if place == len(self._blocks) - 1 else output
        elif self._noted:
            self._go_back(place - 1, self._noted.pop())
        else:
            self._note(place - 1, self._entered.pop())

    def _pairs(self, place: int) -> Mapping[str, LowRank]:
        tuning = self._way.tuning
        return {} if tuning is None else tuning.layers.get(self._indices[place], {})

    def _pass(self, place: int, states: torch.Tensor, pairs: Mapping[str, LowRank]) -> torch.Tensor:
        """What the block answers."""
        with self._way.tuned_layers.applied({self._indices[place]: pairs}):
            return run_blocks([self._blocks[place]], [self._way.calls[place]], _entering(states, self._prompts[place]))

    def _note(self, place: int, states: torch.Tensor) -> torch.Tensor:
        """The same, and now the block has its notes."""
        entering = states.detach().requires_grad_()
        pairs = {path: _trainable(pair) for path, pair in self._pairs(place).items()}
        with torch.enable_grad():
            output = self._pass(place, entering, pairs)
        self._noted.append(_Noted(entering, pairs, output))
        return output.detach()

    def _go_back(self, place: int, noted: "_Noted") -> None:
        self._gradients, of_pairs = noted.gradients(self._gradients)
        if of_pairs:
            self._of_layers[self._indices[place]] = of_pairs
        if self._of_prompts is not None:
            num_prompted = min(self._of_prompts.shape[1], self._gradients.shape[1])
            self._of_prompts[place, :num_prompted] = self._gradients[:, :num_prompted].sum(0, dtype=torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _Noted:
    """A block that has run, with what autograd keeps of it."""

    entering: torch.Tensor
    """Before its prompts were added."""
    pairs: Mapping[str, LowRank]
    output: torch.Tensor

    def gradients(self, grad_output: torch.Tensor) -> tuple[torch.Tensor, dict[str, LowRank]]:
        """Of what entered, and of the pairs: zeros for those of an expert to whom no token went. To be had once."""
        leaves = [tensor for pair in self.pairs.values() for tensor in (pair.down, pair.up)]
        with torch.enable_grad():
            end = _End.apply(self.output, grad_output)  # type: ignore[no-untyped-call]
        grads, *pair_grads = torch.autograd.grad(end, [self.entering, *leaves], materialize_grads=True)
        by_pair = zip(pair_grads[::2], pair_grads[1::2], strict=True)
        return grads, {path: LowRank(*both) for path, both in zip(self.pairs, by_pair, strict=True)}


def _entering(states: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
    """A copy of the states, as some blocks write into what they are given, with the prompts added to the first."""
    entered = states.clone()
    if prompts is not None:
        entered[:, : len(prompts)] += prompts
    return entered


def _trainable(pair: LowRank) -> LowRank:
    return LowRank(pair.down.detach().requires_grad_(), pair.up.detach().requires_grad_())


class _End(torch.autograd.Function):
    """A number to go back from, whose gradient of the output is the given one.

    `torch.autograd.grad`, when it is given a gradient, imports a computer algebra system to compare two shapes: 0.4 s
    of a server's start, as it measures a backward pass.
    """

    @staticmethod
    def forward(context: Any, output: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(grad_output)
        return output.new_zeros(())

    @staticmethod
    def backward(context: Any, grad_end: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_output,) = context.saved_tensors
        return grad_output, None
