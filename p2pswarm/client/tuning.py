"""`Tuning`: what a client brings along to the blocks of a model, wherever they run: deep prompts and low-rank pairs.

Servers install nothing; each call and each session carries the part for its blocks. The gradient of a tuning has the
same parts in the same shapes, so that one class serves both ways. Knows nothing of how the tensors come to be
(`models/tuning/`) nor of autograd (`client/autograd.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.tuning import TunedLayer, WireTuning

Place = tuple[int, str]
"""A block of the model, and the path of a linear layer within it: `(3, "self_attn.q_proj")`."""


@dataclass(frozen=True, slots=True, eq=False)
class Tuning:
    """For all blocks of a model. The tensors are float32 and may require gradients; at least one is there."""

    prompts: torch.Tensor | None = None
    """[blocks of the model, prompt tokens, hidden]: added to the first tokens where they enter each block."""
    layers: Mapping[Place, LowRank] = field(default_factory=dict)
    """What is added to linear layers: `up @ down @ input`, with LoRA's scale in `up`."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` where the parts cannot be right for any model."""
        if self.prompts is None and not self.layers:
            raise ConfigError("a tuning holds prompts or layers; where there are neither, none is wanted")
        if self.prompts is not None and self.prompts.ndim != 3:
            raise ConfigError(f"prompts are [blocks, prompt tokens, hidden], got {list(self.prompts.shape)}")
        for (block, path), pair in self.layers.items():
            down, up = pair.down.shape, pair.up.shape
            if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
                raise ConfigError(
                    f"block {block} {path} takes down [rank, inputs] and up [outputs, rank], got {list(down)} and "
                    f"{list(up)}"
                )
        others = {str(tensor.dtype) for tensor in self.tensors if tensor.dtype is not torch.float32}
        if others:
            raise ConfigError(f"the tensors of a tuning are torch.float32, got {', '.join(sorted(others))}")

    @property
    def places(self) -> list[Place]:
        """Of the layers, in the order in which they travel."""
        return sorted(self.layers)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them: the prompts if there are any, then `down` and `up` of each place."""
        pairs = (self.layers[place] for place in self.places)
        return (*(() if self.prompts is None else (self.prompts,)), *(side for pair in pairs for side in _sides(pair)))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "Tuning":
        """The same parts with other tensors, in the order of `tensors`."""
        left = iter(tensors)
        prompts = None if self.prompts is None else next(left)
        return Tuning(prompts, {place: LowRank(next(left), next(left)) for place in self.places})

    def detached(self) -> "Tuning":
        """A copy that later steps of an optimizer do not change."""
        return self.with_tensors([tensor.detach().clone() for tensor in self.tensors])

    def check_fits(self, num_blocks: int, hidden_size: int) -> None:
        """Raises `ConfigError` where it cannot be for a model of that size."""
        if self.prompts is not None and (self.prompts.shape[0], self.prompts.shape[2]) != (num_blocks, hidden_size):
            raise ConfigError(
                f"prompts for this model are [{num_blocks}, prompt tokens, {hidden_size}], got "
                f"{list(self.prompts.shape)}"
            )
        for block, path in self.places:
            if not 0 <= block < num_blocks:
                raise ConfigError(f"this model has the blocks 0:{num_blocks}, the tuning has block {block} {path}")

    def for_span(self, span: Span) -> WireTuning | None:
        """The part for these blocks, as it travels; None where it changes none of them."""
        prompts = None if self.prompts is None else encode_tensor(self.prompts[span.start : span.end])
        layers = tuple(
            TunedLayer(place[0], place[1], *(encode_tensor(side) for side in _sides(self.layers[place])))
            for place in self.places
            if span.covers(place[0])
        )
        return WireTuning(prompts, layers) if prompts is not None or layers else None

    def of_blocks(self, span: Span) -> SpanTuning | None:
        """The part for these blocks, as blocks in this process take it; None where it changes none of them."""
        prompts = None if self.prompts is None else self.prompts[span.start : span.end]
        layers: dict[int, dict[str, LowRank]] = {}
        for block, path in self.places:
            if span.covers(block):
                layers.setdefault(block, {})[path] = self.layers[block, path]
        return SpanTuning(span, prompts, layers) if prompts is not None or layers else None

    def zeros(self) -> "Tuning":
        """Where the sum of its gradients begins."""
        return self.with_tensors([torch.zeros_like(tensor) for tensor in self.tensors])

    def add(self, span: Span, part: WireTuning) -> None:
        """Adds a span's part, in the shapes of `for_span`, to what is here."""
        if self.prompts is not None and part.prompts is not None:
            self.prompts[span.start : span.end] += decode_tensor(part.prompts)
        for layer in part.layers:
            pair = self.layers[layer.block, layer.path]
            pair.down.add_(decode_tensor(layer.down))
            pair.up.add_(decode_tensor(layer.up))


def as_travels(tuning: SpanTuning) -> WireTuning:
    """The gradients of a part, in the shapes of `Tuning.for_span`."""
    layers = tuple(
        TunedLayer(block, path, *(encode_tensor(side) for side in _sides(pair)))
        for block, pairs in sorted(tuning.layers.items())
        for path, pair in sorted(pairs.items())
    )
    return WireTuning(None if tuning.prompts is None else encode_tensor(tuning.prompts), layers)


def _sides(pair: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    return pair.down, pair.up
