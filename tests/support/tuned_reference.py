"""What transformers' own model makes of a tuning: hooks around blocks and layers, autograd through all of it."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from p2pswarm.blocks.adapters import LowRank, linear_size
from p2pswarm.blocks.span_backward import Gradients
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.core.span import Span


def random_tuning(
    blocks: nn.ModuleList, span: Span, *, hidden_size: int, num_prompts: int = 5, rank: int = 3, seed: int = 0
) -> SpanTuning:
    """Prompts and pairs for all linear layers, large enough that each changes every result."""
    generator = torch.Generator().manual_seed(seed)

    def pair(size: tuple[int, int]) -> LowRank:
        inputs, outputs = size
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        return LowRank(down, 0.3 * torch.randn(outputs, rank, generator=generator))

    layers = {
        index: {path: pair(size) for path, layer in blocks[index].named_modules() if (size := linear_size(layer))}
        for index in range(span.start, span.end)
    }
    prompts = 0.5 * torch.randn(span.num_blocks, num_prompts, hidden_size, generator=generator)
    return SpanTuning(span, prompts, layers)


class LocalSpan:
    """Some blocks of a whole local model, with a tuning."""

    def __init__(self, model: Any, blocks: nn.ModuleList, span: Span) -> None:
        self.model = model.requires_grad_(False)
        self.blocks = blocks
        self.span = span

    def run(self, states: torch.Tensor, tuning: SpanTuning | None = None, **arguments: Any) -> torch.Tensor:
        """The hidden states after the span's last block; `arguments` are those of the model's `forward`."""
        outputs: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for index in range(self.span.start, self.span.end):
                block = self.blocks[index]
                given = states if index == self.span.start else None
                added = tuning.prompts[index - self.span.start] if tuning and tuning.prompts is not None else None
                hooks.enter_context(block.register_forward_pre_hook(_entry(given, added), with_kwargs=True))
                for path, pair in (tuning.layers.get(index, {}) if tuning else {}).items():
                    hook = block.get_submodule(path).register_forward_hook(
                        lambda _, inputs, output, pair=pair: output + pair.product(inputs[0]).to(output.dtype)
                    )
                    hooks.enter_context(hook)
            hook = self.blocks[self.span.end - 1].register_forward_hook(
                lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
            )
            hooks.enter_context(hook)
            tokens = torch.ones(states.shape[:2], dtype=torch.int64)
            self.model(input_ids=tokens, use_cache=False, **arguments)
        return outputs[0]

    def gradients(
        self, states: torch.Tensor, grad_outputs: torch.Tensor, tuning: SpanTuning, **arguments: Any
    ) -> Gradients:
        """By torch's autograd through the whole model at once."""
        states, leaves = states.clone().requires_grad_(), _trainable(tuning)
        output = self.run(states, leaves, **arguments)
        wanted = [states, *tensors_of(leaves)]
        inputs, *others = torch.autograd.grad(output, wanted, grad_outputs, materialize_grads=True)
        remaining = iter(others)
        prompts = None if leaves.prompts is None else next(remaining)
        layers = {
            index: {path: LowRank(next(remaining), next(remaining)) for path in pairs}
            for index, pairs in leaves.layers.items()
        }
        return Gradients(inputs, SpanTuning(tuning.blocks, prompts, layers))


def tensors_of(tuning: SpanTuning) -> list[torch.Tensor]:
    """In one order for all tunings of one shape."""
    prompts = [] if tuning.prompts is None else [tuning.prompts]
    pairs = [pair for index in sorted(tuning.layers) for _, pair in sorted(tuning.layers[index].items())]
    return [*prompts, *(tensor for pair in pairs for tensor in (pair.down, pair.up))]


def _trainable(tuning: SpanTuning) -> SpanTuning:
    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone().requires_grad_()

    prompts = None if tuning.prompts is None else leaf(tuning.prompts)
    layers = {
        index: {path: LowRank(leaf(pairs[path].down), leaf(pairs[path].up)) for path in sorted(pairs)}
        for index, pairs in sorted(tuning.layers.items())
    }
    return SpanTuning(tuning.blocks, prompts, layers)


def _entry(given: torch.Tensor | None, prompts: torch.Tensor | None) -> Callable[..., Any]:
    """A hook that swaps in what is given, and adds prompts to the first tokens."""

    def enter(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        states = arguments[0] if arguments else named["hidden_states"]
        states = states if given is None else given
        if prompts is not None:
            shown = prompts[: states.shape[1]].to(states.dtype)
            states = torch.cat([states[:, : len(shown)] + shown, states[:, len(shown) :]], dim=1)
        if arguments:
            return (states, *arguments[1:]), named
        return arguments, {**named, "hidden_states": states}

    return enter
