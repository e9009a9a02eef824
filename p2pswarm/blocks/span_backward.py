"""Gradients back through a span's blocks, whose own weights stay as they are.

First the blocks run forward and only what enters each is kept; then, from the last block to the first, each runs once
more, this time noting what its gradient needs, and goes back. So at any time memory holds the hidden states of all
tokens once for each block, and the notes of one block: `blocks + notes` times `tokens x hidden`, where `notes` is 21
for SmolLM2 and 12 to 35 in other plain decoders. In those whose attention notes a number for each pair of tokens
(Gemma 2, BLOOM, Falcon, gpt-oss) it grows with the tokens. Rows do not depend on one another: who has less memory goes
back row by row.

What blocks are called with beside hidden states (masks, rotary embeddings) comes from the caller, as `SpanModel`
collects it.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
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


def go_back(
    blocks: Mapping[int, nn.Module],
    calls: Sequence[BlockCall],
    states: torch.Tensor,
    grad_outputs: torch.Tensor,
    tuning: SpanTuning,
    tuned_layers: TunedLayers,
) -> Gradients:
    """The gradients of inputs and tuning, where `grad_outputs` are those of `run_blocks` with the tuning applied.

    `blocks`: those of the tuning, in order. No tensor may be of inference mode, which must be off.
    """
    prompts = tuning.prompts_at(0, states.shape[1])
    by_place = [None] * len(blocks) if prompts is None else list(prompts)
    kept = _inputs(list(blocks.values()), calls, states, by_place, tuned_layers.applied(tuning.layers))
    prompt_grads = None if tuning.prompts is None else torch.zeros_like(tuning.prompts)
    layer_grads: dict[int, dict[str, LowRank]] = {}
    grads = grad_outputs
    for place, (index, block) in reversed(list(enumerate(blocks.items()))):
        entering = kept.pop().detach().requires_grad_()
        pairs = {path: _trainable(pair) for path, pair in tuning.layers.get(index, {}).items()}
        with torch.enable_grad(), tuned_layers.applied({index: pairs}):
            output = run_blocks([block], [calls[place]], _entering(entering, by_place[place]))
        grads, pair_grads = _gradients(output, grads, entering, pairs)
        del output  # and with it what the block noted, before the next one does
        if pairs:
            layer_grads[index] = pair_grads
        if prompt_grads is not None:
            num_prompted = min(prompt_grads.shape[1], grads.shape[1])
            prompt_grads[place, :num_prompted] = grads[:, :num_prompted].sum(0, dtype=torch.float32)
    return Gradients(grads, SpanTuning(tuning.blocks, prompt_grads, layer_grads))


def _inputs(
    blocks: Sequence[nn.Module],
    calls: Sequence[BlockCall],
    states: torch.Tensor,
    prompts: Sequence[torch.Tensor | None],
    applied: AbstractContextManager[None],
) -> list[torch.Tensor]:
    """What comes to each block, before its prompts are added."""
    inputs = [states]
    with torch.no_grad(), applied:
        for block, call, added in zip(blocks[:-1], calls[:-1], prompts[:-1], strict=True):
            inputs.append(run_blocks([block], [call], _entering(inputs[-1], added)))
    return inputs


def _entering(states: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
    """A copy of the states, as some blocks write into what they are given, with the prompts added to the first."""
    entered = states.clone()
    if prompts is not None:
        entered[:, : len(prompts)] += prompts
    return entered


def _trainable(pair: LowRank) -> LowRank:
    return LowRank(pair.down.detach().requires_grad_(), pair.up.detach().requires_grad_())


def _gradients(
    output: torch.Tensor, grad_output: torch.Tensor, entering: torch.Tensor, pairs: Mapping[str, LowRank]
) -> tuple[torch.Tensor, dict[str, LowRank]]:
    """Of what entered, and of the pairs; zeros for the pairs of an expert to whom no token went."""
    leaves = [tensor for pair in pairs.values() for tensor in (pair.down, pair.up)]
    with torch.enable_grad():
        end = _End.apply(output, grad_output)  # type: ignore[no-untyped-call]
    grads, *pair_grads = torch.autograd.grad(end, [entering, *leaves], materialize_grads=True)
    by_pair = zip(pair_grads[::2], pair_grads[1::2], strict=True)
    return grads, {path: LowRank(*both) for path, both in zip(pairs, by_pair, strict=True)}


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
