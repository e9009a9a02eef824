"""What a caller brings along to the blocks that serve it: deep prompts, and low-rank pairs for linear layers.

Nothing of it is installed: it is given to each run, and forgotten with it. Its gradient has the same shape, so that
one type serves both ways. `tuned_layers.py` says how layers compute with it, `span_backward.py` how gradients come
back. Nothing here knows how it came or who sent it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from p2pswarm.blocks.adapters import LowRank, linear_size
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span

NAMES_IN_MESSAGE = 8
"""How many layers an error lists; a block of experts may have hundreds."""


@dataclass(frozen=True, slots=True, eq=False)
class SpanTuning:
    """Deep prompts and low-rank pairs for some blocks, or the gradients of them."""

    blocks: Span
    prompts: torch.Tensor | None = None
    """[blocks, prompt tokens, hidden]: added to the hidden states of a text's first tokens where they enter each block.
    The first tokens of a padded text are its padding.
    """
    layers: Mapping[int, Mapping[str, LowRank]] = field(default_factory=dict)
    """By the block's index in the model, and the path of the layer within it."""

    @property
    def num_bytes(self) -> int:
        """What its tensors take in memory."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def prompts_at(self, position: int, num_tokens: int) -> torch.Tensor | None:
        """What is added to the first of so many tokens that follow `position` others: `[blocks, up to num_tokens,
        hidden]`; None where there is nothing to add.
        """
        if self.prompts is None or position >= self.prompts.shape[1]:
            return None
        return self.prompts[:, position : position + num_tokens]

    def plus(self, other: "SpanTuning") -> "SpanTuning":
        """The sum of two gradients of one tuning, as of two parts of a batch."""
        assert self.blocks == other.blocks
        prompts = None
        if self.prompts is not None and other.prompts is not None:
            prompts = self.prompts + other.prompts
        layers = {
            index: {
                path: LowRank(pair.down + other.layers[index][path].down, pair.up + other.layers[index][path].up)
                for path, pair in pairs.items()
            }
            for index, pairs in self.layers.items()
        }
        return SpanTuning(self.blocks, prompts, layers)

    def _tensors(self) -> Iterator[torch.Tensor]:
        if self.prompts is not None:
            yield self.prompts
        for pairs in self.layers.values():
            for pair in pairs.values():
                yield pair.down
                yield pair.up


def fit_tuning(
    tuning: SpanTuning, blocks: Mapping[int, nn.Module], *, hidden_size: int, device: torch.device
) -> SpanTuning:
    """The tuning in float32 on the device, once it is known to fit. Raises `ConfigError` with what does not.

    `blocks`: of the span that is served, by their indices in the model.
    """
    missing = [index for index in range(tuning.blocks.start, tuning.blocks.end) if index not in blocks]
    if missing:
        raise ConfigError(f"the tuning is for the blocks {tuning.blocks}, block {missing[0]} is not served here")
    prompts = None
    if tuning.prompts is not None:
        _check_prompts(tuning.prompts, tuning.blocks, hidden_size)
        prompts = _taken_over("the prompts", tuning.prompts, device)
    layers = {
        index: {path: _fit_pair(index, path, pair, tuning.blocks, blocks, device) for path, pair in pairs.items()}
        for index, pairs in tuning.layers.items()
    }
    return SpanTuning(tuning.blocks, prompts, layers)


def _check_prompts(prompts: torch.Tensor, blocks: Span, hidden_size: int) -> None:
    shape = list(prompts.shape)
    if len(shape) != 3 or shape[1] == 0 or (shape[0], shape[2]) != (blocks.num_blocks, hidden_size):
        raise ConfigError(
            f"the prompts of the tuning have the shape {shape}, wanted [{blocks.num_blocks}, prompt tokens, "
            f"{hidden_size}] for the blocks {blocks}"
        )


def _fit_pair(
    index: int, path: str, pair: LowRank, span: Span, blocks: Mapping[int, nn.Module], device: torch.device
) -> LowRank:
    name = f"{path} of block {index}"
    if not span.covers(index):
        raise ConfigError(f"the tuning changes {name}, but is for the blocks {span}")
    inputs, outputs = _size(name, path, blocks[index])
    down, up = list(pair.down.shape), list(pair.up.shape)
    if len(down) != 2 or len(up) != 2 or (down[1], up[0]) != (inputs, outputs):
        raise ConfigError(
            f"the tuning of {name} has the shapes {down} and {up}, wanted [rank, {inputs}] and [{outputs}, rank]"
        )
    if down[0] == 0 or down[0] != up[1]:
        raise ConfigError(
            f"the tuning of {name} has the rank {down[0]} in its first matrix and {up[1]} in its second, wanted one "
            "rank of at least 1"
        )
    return LowRank(
        _taken_over(f"the first matrix of {name}", pair.down, device),
        _taken_over(f"the second matrix of {name}", pair.up, device),
    )


def _size(name: str, path: str, block: nn.Module) -> tuple[int, int]:
    try:
        layer = block.get_submodule(path)
    except AttributeError as error:
        raise ConfigError(f"the tuning changes {name}, which has no such layer, but {_linear_layers(block)}") from error
    size = linear_size(layer) if path else None
    if size is None:
        raise ConfigError(
            f"the tuning changes {name}, a {type(layer).__name__}; only linear layers can be tuned: "
            f"{_linear_layers(block)}"
        )
    return size


def _linear_layers(block: nn.Module) -> str:
    paths = [path for path, layer in block.named_modules() if linear_size(layer) is not None]
    return ", ".join(paths[:NAMES_IN_MESSAGE]) + (", ..." if len(paths) > NAMES_IN_MESSAGE else "")


def _taken_over(what: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise ConfigError(f"the tuning has {tensor.dtype} for {what}, wanted floats")
    with torch.inference_mode(False):
        # What was made in inference mode could not be trained.
        own = tensor.detach().to(device, torch.float32, copy=tensor.is_inference())
    if not bool(own.isfinite().all()):
        raise ConfigError(f"the tuning has values that are not finite for {what}")
    return own
