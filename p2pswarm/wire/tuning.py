"""`WireTuning`: what a client brings along to the blocks it uses, deep prompts and low-rank pairs, and their gradients.

It travels with a call or a session, cut to the blocks of its span; the server forgets it with them. The gradient of a
tuning has the same parts in the same shapes, so it is a `WireTuning` too. Checked here is what no model could make
right; whether the paths and sizes are those of the span's layers is for the server to say.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span
from p2pswarm.wire.frames import num_bytes
from p2pswarm.wire.tensors import FLOAT_DTYPES, Codec, WireTensor

MAX_TUNED_LAYERS = 1024
"""Of one message: seven linear layers in each of 126 blocks, the most of any dense model, make 882."""
MAX_PATH_CHARACTERS = 128
MAX_TUNED_SIZE = 1 << 24
"""Of one dimension of a tuning's tensors: far above any model's layers."""

_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True, slots=True)
class TunedLayer:
    """One low-rank pair: the layer's output gets `up @ down @ input` added."""

    block: int
    """Its index in the model."""
    path: str
    """Of the linear layer within its block, as transformers names it: `self_attn.q_proj`."""
    down: WireTensor
    """[rank, inputs]"""
    up: WireTensor
    """[outputs, rank], with LoRA's scale in it."""

    def __post_init__(self) -> None:
        if self.block < 0:
            raise ConfigError(f"blocks of a tuning are counted from 0, got {self.block}")
        if len(self.path) > MAX_PATH_CHARACTERS or not _PATH.fullmatch(self.path):
            raise ConfigError(
                f"a tuned layer's path is at most {MAX_PATH_CHARACTERS} characters such as self_attn.q_proj, "
                f"got {self.path[: MAX_PATH_CHARACTERS + 1]!r}"
            )
        for name, tensor in (("down", self.down), ("up", self.up)):
            _check_tensor(
                tensor, 2, f"{name} of {self.name}", "[rank, inputs]" if name == "down" else "[outputs, rank]"
            )
        if self.down.shape[0] != self.up.shape[1]:
            raise ConfigError(
                f"down and up of {self.name} share one rank, got {self.down.shape[0]} in {list(self.down.shape)} and "
                f"{self.up.shape[1]} in {list(self.up.shape)}"
            )

    @property
    def name(self) -> str:
        """For people: `block 3 self_attn.q_proj`."""
        return f"block {self.block} {self.path}"

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class WireTuning:
    """At least one prompt or layer; all tensors of one float dtype, written with `Codec.NONE`."""

    prompts: WireTensor | None = None
    """[blocks of the span, prompt tokens, hidden]: added to the hidden states of the first tokens where they enter each
    block."""
    layers: tuple[TunedLayer, ...] = ()
    """In the order of (block, path), each at most once."""

    def __post_init__(self) -> None:
        if self.prompts is not None:
            _check_tensor(self.prompts, 3, "prompts", "[blocks, prompt tokens, hidden]")
        elif not self.layers:
            raise ConfigError("a tuning holds prompts or layers; where there are neither, none is sent")
        if len(self.layers) > MAX_TUNED_LAYERS:
            raise ConfigError(f"a tuning has at most {MAX_TUNED_LAYERS} layers a message, got {len(self.layers)}")
        keys = [(layer.block, layer.path) for layer in self.layers]
        if any(key >= following for key, following in pairwise(keys)):
            raise ConfigError("the layers of a tuning are sorted by block and path, each at most once")
        dtypes = sorted({tensor.dtype for tensor in self.tensors()})
        if len(dtypes) > 1:
            raise ConfigError(f"all tensors of a tuning have one dtype, got {' and '.join(dtypes)}")

    def tensors(self) -> Iterator[WireTensor]:
        """All of them, in the order in which they travel."""
        if self.prompts is not None:
            yield self.prompts
        for layer in self.layers:
            yield layer.down
            yield layer.up

    @property
    def dtype(self) -> str:
        return next(self.tensors()).dtype

    @property
    def num_bytes(self) -> int:
        """Of its tensors, on the wire and in memory."""
        return sum(num_bytes(tensor.data) for tensor in self.tensors())

    @property
    def num_elements(self) -> int:
        """Numbers in all of its tensors."""
        return sum(tensor.num_elements for tensor in self.tensors())

    def check_fits(self, span: Span, hidden_size: int | None = None) -> None:
        """Raises `ConfigError` for blocks outside the span, or prompts of another hidden size (where it is known)."""
        if self.prompts is not None:
            num_blocks, _, prompt_size = self.prompts.shape
            if num_blocks != span.num_blocks:
                raise ConfigError(f"blocks {span} take prompts for {span.num_blocks} blocks, got {num_blocks}")
            if hidden_size not in (None, prompt_size):
                raise ConfigError(f"prompts have the hidden size of the inputs, {hidden_size}, got {prompt_size}")
        for layer in self.layers:
            if not span.covers(layer.block):
                raise ConfigError(f"a tuning for blocks {span} has no layers of others, got {layer.name}")


def same_parts(one: WireTuning | None, other: WireTuning | None) -> bool:
    """Whether both hold the same layers and prompts, in the same shapes and dtype: a tuning and its gradient do."""
    if one is None or other is None:
        return one is other
    return _parts(one) == _parts(other)


def _parts(tuning: WireTuning) -> object:
    return (
        tuning.dtype,
        None if tuning.prompts is None else tuning.prompts.shape,
        [(layer.block, layer.path, layer.down.shape, layer.up.shape) for layer in tuning.layers],
    )


def _check_tensor(tensor: WireTensor, num_dimensions: int, name: str, wanted: str) -> None:
    shape = tensor.shape
    if len(shape) != num_dimensions or not 0 < min(shape) <= max(shape) <= MAX_TUNED_SIZE:
        raise ConfigError(f"{name} is {wanted} with sizes from 1 to {MAX_TUNED_SIZE}, got {list(shape)}")
    if tensor.dtype not in FLOAT_DTYPES or tensor.codec is not Codec.NONE:
        raise ConfigError(f"{name} is float by codec none, got {tensor.dtype} by codec {tensor.codec.value}")
