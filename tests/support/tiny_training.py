"""What training through a swarm is compared with: the same blocks in this process, in one graph of torch's own.

Written without the rooms under test: hooks on transformers' own model.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.blocks.architecture import lay_out
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.tuning import Place, Tuning
from p2pswarm.core.span import Span

HIDDEN_SIZE = 64
NUM_BLOCKS = 8
WHOLE = Span(0, NUM_BLOCKS)
NUM_PROMPTS = 4
RANK = 3
TUNED_PATHS = {
    "llama": ("self_attn.q_proj", "mlp.down_proj"),
    "gemma2": ("self_attn.v_proj", "mlp.gate_proj"),
    "gpt2": ("attn.c_attn", "mlp.c_proj"),
    "bloom": ("self_attention.query_key_value", "mlp.dense_4h_to_h"),
}
TUNED_BLOCKS = (0, 2, 3, 6, 7)


@dataclass(frozen=True)
class Gradients:
    """Of the sum of `output * weights`."""

    output: torch.Tensor
    inputs: torch.Tensor
    tuning: tuple[torch.Tensor, ...]
    """In the order of `Tuning.tensors`."""


class LocalBlocks:
    """All blocks of a checkpoint's model in this process; the model's weights are frozen."""

    def __init__(self, checkpoint: Checkpoint, local: Any) -> None:
        local.requires_grad_(False)
        self._decoder = local.base_model
        self._blocks = local.get_submodule(lay_out(checkpoint.config, torch.float32).blocks_path)

    def __call__(
        self,
        states: torch.Tensor,
        tuning: Tuning | None = None,
        mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        blocks: Span = WHOLE,
    ) -> torch.Tensor:
        """The states after the last of the blocks, differentiable by whatever goes in."""
        with self._hooked(states, tuning, blocks) as taken:
            named = {} if position_ids is None else {"position_ids": position_ids}
            self._decoder(
                inputs_embeds=torch.zeros_like(states),
                attention_mask=None if mask is None else mask.long(),
                use_cache=False,
                **named,
            )
        return taken[0]

    def gradients(
        self, states: torch.Tensor, weights: torch.Tensor, tuning: Tuning | None = None, **options: Any
    ) -> Gradients:
        """Of new leaves with the values of `states` and `tuning`."""
        inputs = states.detach().clone().requires_grad_()
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (tuning.tensors if tuning else ())]
        output = self(inputs, tuning.with_tensors(leaves) if tuning else None, **options)
        found = torch.autograd.grad((output * weights).sum(), [inputs, *leaves])
        return Gradients(output.detach(), found[0], found[1:])

    @contextmanager
    def _hooked(self, states: torch.Tensor, tuning: Tuning | None, span: Span) -> Iterator[list[torch.Tensor]]:
        taken: list[torch.Tensor] = []

        def entering(index: int) -> Any:
            def hook(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
                came = arguments[0] if arguments else named.pop("hidden_states")
                given = states if index == span.start else came
                if tuning is not None and tuning.prompts is not None:
                    added = tuning.prompts[index][: given.shape[1]]
                    given = given + F.pad(added, (0, 0, 0, given.shape[1] - len(added)))
                return (given, *arguments[1:]), named

            return hook

        def leaving(module: Any, arguments: Any, output: Any) -> None:
            taken.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as hooks:
            for index in range(span.start, span.end):
                hook = self._blocks[index].register_forward_pre_hook(entering(index), with_kwargs=True)
                hooks.callback(hook.remove)
            for (index, path), pair in (tuning.layers if tuning is not None else {}).items():
                layer = self._blocks[index].get_submodule(path)
                hooks.callback(layer.register_forward_hook(_adding(pair)).remove)
            hooks.callback(self._blocks[span.end - 1].register_forward_hook(leaving).remove)
            yield taken


def _adding(pair: LowRank) -> Any:
    return lambda module, inputs, output: output + F.linear(F.linear(inputs[0], pair.down), pair.up)


def random_tuning(
    local: Any, checkpoint: Checkpoint, *, paths: Sequence[str], prompts: bool = True, seed: int = 0
) -> Tuning:
    """Deep prompts and low-rank pairs that change every answer."""
    generator = torch.Generator().manual_seed(seed)
    blocks = local.get_submodule(lay_out(checkpoint.config, torch.float32).blocks_path)
    layers: dict[Place, LowRank] = {}
    for index in TUNED_BLOCKS:
        for path in paths:
            weight = blocks[index].get_submodule(path).weight
            is_turned = type(blocks[index].get_submodule(path)).__name__ == "Conv1D"
            outputs, inputs = reversed(weight.shape) if is_turned else weight.shape
            down, up = torch.randn(RANK, inputs, generator=generator), torch.randn(outputs, RANK, generator=generator)
            layers[index, path] = LowRank(0.1 * down, 0.1 * up)
    states = 0.3 * torch.randn(NUM_BLOCKS, NUM_PROMPTS, HIDDEN_SIZE, generator=generator)
    return Tuning(states if prompts else None, layers)


def random_states(batch_size: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def left_padding(batch_size: int, num_tokens: int) -> torch.Tensor:
    """bool: the first row is whole, each further one a token shorter."""
    return torch.arange(num_tokens)[None] >= torch.arange(batch_size)[:, None] % (num_tokens - 1)
