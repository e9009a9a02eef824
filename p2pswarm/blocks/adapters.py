"""LoRA adapters in peft's format: which tensors change which layer of which block, checked against the model.

A layer that computes `x W^T` computes `x W^T + scale (x A^T) B^T` with an adapter, where `lora_A` is `[rank, inputs]`
and `lora_B` is `[outputs, rank]` (2106.09685). Whatever else peft can train into an adapter is refused: left out, it
would make the answers fluent and wrong. How layers compute with them is in `adapted_layers.py`.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from p2pswarm.blocks.architecture import Layout
from p2pswarm.blocks.loading import LANGUAGE_MODEL_NAMES
from p2pswarm.blocks.quantized_linear import KernelLinear
from p2pswarm.core.errors import CheckpointError
from p2pswarm.core.span import Span

TENSOR_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
NUMBERS_AND_STORIES = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
        "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
        "runtime_config", "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip
"""Keys of a config that are read below, or tell only how the tensors came to be; dropout is for training. Any other
key must be off, those of future versions of peft included."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the model's own weights as they are."""


class AdapterSource(Protocol):
    """What this room needs of an adapter's files. `checkpoint.AdapterFiles` is one."""

    @property
    def adapter_id(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one layer."""

    down: torch.Tensor
    """[rank, inputs]"""
    up: torch.Tensor
    """[outputs, rank], the scale in it."""

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """What is added for these states, in the dtype of the pair."""
        return F.linear(F.linear(states.to(self.down.dtype), self.down), self.up)


@dataclass(frozen=True, slots=True)
class LowRankPlace:
    """Where that is among the tensors of an adapter."""

    down_name: str
    up_name: str
    num_values: int
    scale: float


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter of the blocks of a span."""

    adapter_id: str
    blocks: Mapping[int, Mapping[str, LowRank]]
    """By block and path of the layer within it."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that fits a model, of which nothing is loaded; made by `fit_adapter`."""

    source: AdapterSource
    blocks: Mapping[int, Mapping[str, LowRankPlace]]

    @property
    def adapter_id(self) -> str:
        return self.source.adapter_id

    def block_bytes(self, index: int, dtype: torch.dtype) -> int:
        """What it adds to a block's weights in memory."""
        return sum(place.num_values for place in self.blocks.get(index, {}).values()) * dtype.itemsize

    def load(self, span: Span, *, dtype: torch.dtype, device: torch.device) -> LoadedAdapter:
        """Reads what the span's blocks need. Raises `CheckpointError`."""
        blocks = {
            index: {path: self._load_layer(place, dtype, device) for path, place in layers.items()}
            for index, layers in self.blocks.items()
            if span.covers(index)
        }
        self.source.release()
        return LoadedAdapter(self.adapter_id, blocks)

    def _load_layer(self, place: LowRankPlace, dtype: torch.dtype, device: torch.device) -> LowRank:
        tensors = self.source.read([place.down_name, place.up_name])
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise CheckpointError(f"{self.adapter_id}: {name} holds values that are not finite floats")
        up = tensors[place.up_name].to(torch.float32) * place.scale
        # A copy, so that the file may change or go.
        return LowRank(tensors[place.down_name].to(device, dtype, copy=True), up.to(device, dtype))


def fit_adapter(source: AdapterSource, layout: Layout) -> Adapter:
    """What the adapter changes in a model of this layout. Raises `CheckpointError` where it does not fit the model, or
    is more than LoRA on linear layers of blocks.
    """
    _check_config(source)
    pairs: dict[str, dict[str, str]] = {}
    for name in source.shapes:
        found = TENSOR_NAME.fullmatch(name)
        if found is None:
            raise CheckpointError(f"{source.adapter_id}: {name} is no lora_A or lora_B of a linear layer")
        pairs.setdefault(found["layer"], {})[found["side"]] = name
    if not pairs:
        raise CheckpointError(f"{source.adapter_id} holds no tensors")
    blocks: dict[int, dict[str, LowRankPlace]] = {}
    for layer_name, pair in pairs.items():
        index, path, layer = _find_layer(source, layout, layer_name)
        blocks.setdefault(index, {})[path] = _place(source, layer_name, layer, pair)
    return Adapter(source, blocks)


def _check_config(source: AdapterSource) -> None:
    config = source.config
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{source.adapter_id} is of the type {config.get('peft_type')}, only LORA is served")
    for key, value in config.items():
        if key not in NUMBERS_AND_STORIES and value not in (None, False, "none", [], {}):
            raise CheckpointError(f"{source.adapter_id} has {key} = {str(value)[:80]}, which is not supported")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise CheckpointError(
            f"{source.adapter_id} was begun by {start}, which changes the model's own weights; convert it to plain "
            "LoRA (peft's save_pretrained(path_initial_model_for_weight_conversion=...))"
        )


def _find_layer(source: AdapterSource, layout: Layout, name: str) -> tuple[int, str, nn.Module]:
    """The block, the path in it and the layer of that name in the whole model."""
    within = name
    for pattern, replacement in LANGUAGE_MODEL_NAMES.items():
        within = re.sub(pattern, replacement, within)
    number, _, path = within.removeprefix(f"{layout.blocks_path}.").partition(".")
    if not within.startswith(f"{layout.blocks_path}.") or not number.isdecimal() or int(number) >= layout.num_blocks:
        raise CheckpointError(
            f"{source.adapter_id} adapts {name}, which is in none of the blocks {layout.blocks_path}.0 to "
            f"{layout.num_blocks - 1} of this model; only blocks are served"
        )
    index = int(number)
    try:
        layer = layout.blocks[index].get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(f"{source.adapter_id} adapts {name}, which this model does not have") from error
    return index, path, layer


def _place(source: AdapterSource, layer_name: str, layer: nn.Module, pair: Mapping[str, str]) -> LowRankPlace:
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(f"{source.adapter_id} has only lora_{next(iter(pair))} of {layer_name}")
    rank, scale = _rank_and_scale(source, layer_name)
    inputs, outputs = _size(source, layer_name, layer)
    for name, wanted in ((pair["A"], (rank, inputs)), (pair["B"], (outputs, rank))):
        if source.shapes[name] != wanted:
            raise CheckpointError(
                f"{source.adapter_id}: {name} has the shape {list(source.shapes[name])}, this model and rank {rank} "
                f"want {list(wanted)}"
            )
    return LowRankPlace(pair["A"], pair["B"], rank * (inputs + outputs), scale)


def linear_size(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, however it is stored; None for any other module."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's name for a linear layer stored the other way round

    if isinstance(layer, nn.Linear | KernelLinear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        inputs, outputs = layer.weight.shape
        return inputs, outputs
    return None


def _size(source: AdapterSource, layer_name: str, layer: nn.Module) -> tuple[int, int]:
    size = linear_size(layer)
    if size is None:
        raise CheckpointError(
            f"{source.adapter_id} adapts {layer_name}, a {type(layer).__name__}: only linear layers are supported"
        )
    return size


def _rank_and_scale(source: AdapterSource, layer_name: str) -> tuple[int, float]:
    """Of one layer, as peft finds them: patterns are regular expressions for the end of a layer's name."""
    config = source.config
    rank = _of_layer(source, "rank_pattern", layer_name, config.get("r"))
    alpha = _of_layer(source, "alpha_pattern", layer_name, config.get("lora_alpha"))
    is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not is_rank or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{source.adapter_id}: {layer_name} has the rank {rank!r} and the alpha {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(source: AdapterSource, key: str, layer_name: str, usual: Any) -> Any:
    patterns = source.config.get(key) or {}
    try:
        matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer_name))
        return next(matching, usual)
    except (re.error, AttributeError) as error:
        raise CheckpointError(f"{source.adapter_id} has a {key} that cannot be read: {error}") from error
