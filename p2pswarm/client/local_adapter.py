"""An adapter in a folder of this machine, checked against the model: read here, and carried along by sessions.

Three kinds, told apart by the `peft_type` of `adapter_config.json`: peft's `LORA` (with the checks that servers make of
theirs) and `PROMPT_TUNING`, and our own `DEEP_PROMPT_TUNING`, which has `deep_prompt_embeddings` [blocks, prompt
tokens, hidden] beside peft's `prompt_embeddings`. `models/tuning/` writes and trains them.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from p2pswarm.blocks.adapters import LowRank, fit_adapter
from p2pswarm.blocks.architecture import Head, Layout, lay_out
from p2pswarm.blocks.loading import LOADING
from p2pswarm.checkpoint.adapter_files import CONFIG_NAME, AdapterFiles, open_adapter
from p2pswarm.checkpoint.adapter_place import AdapterPlace
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.carried import Carried
from p2pswarm.client.tuning import Place, Tuning
from p2pswarm.core.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

LORA, PROMPT_TUNING, DEEP_PROMPT_TUNING = "LORA", "PROMPT_TUNING", "DEEP_PROMPT_TUNING"
PROMPT_NAME, DEEP_PROMPT_NAME = "prompt_embeddings", "deep_prompt_embeddings"
MODEL_ID_KEY = "p2pswarm_model_id"
"""In the metadata of the tensors' file: the model that was tuned."""
TENSOR_PREFIXES = {LORA: "base_model.model.", PROMPT_TUNING: "base_model.", DEEP_PROMPT_TUNING: "base_model."}
"""What peft puts before the names of the model's own tensors."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """What LoRA adds to one linear layer: `scale * up @ down @ input`."""

    down: torch.Tensor
    """[rank, inputs]"""
    up: torch.Tensor
    """[outputs, rank]"""
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class LocalAdapter:
    """All tensors in float32, finite, and of this model's sizes."""

    config: Mapping[str, Any]
    prompts: torch.Tensor | None = None
    """[prompt tokens, embedding size]"""
    deep_prompts: torch.Tensor | None = None
    """[blocks, prompt tokens, hidden]"""
    pairs: Mapping[Place, LoraPair] = field(default_factory=dict)
    heads: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Trained with it, by their names in the model: `score.weight`."""

    @property
    def kind(self) -> str:
        return str(self.config["peft_type"])

    @property
    def num_labels(self) -> int | None:
        """Of a head that was trained with it."""
        return next((tensor.shape[0] for tensor in self.heads.values()), None)

    @torch.no_grad()
    def fill_heads(self, model: nn.Module) -> None:
        """Writes what was trained of the model's own heads over them. Raises `ConfigError` for other labels."""
        parameters = dict(model.named_parameters())
        for name, tensor in self.heads.items():
            if parameters[name].shape != tensor.shape:
                raise ConfigError(
                    f"the adapter's {name} is for {tensor.shape[0]} labels, this model has {parameters[name].shape[0]}"
                )
            parameters[name].copy_(tensor)

    def carried(self) -> Carried:
        """What a session needs of it."""
        layers = {place: LowRank(pair.down, pair.scale * pair.up) for place, pair in self.pairs.items()}
        has_tuning = layers or self.deep_prompts is not None
        return Carried(self.prompts, Tuning(self.deep_prompts, layers) if has_tuning else None)


def is_local_adapter(name: str) -> bool:
    """Whether it is a folder with an adapter, and not the name of one that servers have."""
    return (Path(name).expanduser() / CONFIG_NAME).is_file()


def read_local_adapter(path: str | Path, checkpoint: Checkpoint, head: Head = Head.CAUSAL_LM) -> LocalAdapter:
    """Blocking. Raises `CheckpointError` where it does not fit the model with that head, or is of another kind."""
    files = open_adapter(AdapterPlace(str(path), Path(path).name))
    with LOADING:
        layout = lay_out(checkpoint.config, torch.float32, head)
    tuned_id = files.metadata.get(MODEL_ID_KEY, checkpoint.model_id)
    if tuned_id != checkpoint.model_id:
        logger.warning("%s was tuned for %s, and is used with %s", path, tuned_id, checkpoint.model_id)
    try:
        match files.config.get("peft_type"):
            case "LORA":
                return _read_lora(files, layout)
            case "PROMPT_TUNING" | "DEEP_PROMPT_TUNING":
                return _read_prompts(files, layout)
            case other:
                raise CheckpointError(
                    f"{path} is of the type {other}; {LORA}, {PROMPT_TUNING} and {DEEP_PROMPT_TUNING} are supported"
                )
    finally:
        files.release()


def _read_lora(files: AdapterFiles, layout: Layout) -> LocalAdapter:
    heads = _head_names(files, LORA)
    adapter = fit_adapter(_WithoutHeads(files, heads), layout)
    pairs = {}
    for block, layers in adapter.blocks.items():
        for path, place in layers.items():
            tensors = _read(files, (place.down_name, place.up_name))
            pairs[block, path] = LoraPair(tensors[place.down_name], tensors[place.up_name], place.scale)
    return LocalAdapter(files.config, pairs=pairs, heads=_read_heads(files, heads, layout))


def _read_prompts(files: AdapterFiles, layout: Layout) -> LocalAdapter:
    config, kind = files.config, str(files.config["peft_type"])
    if config.get("num_transformer_submodules") not in (None, 1):
        raise CheckpointError(f"{files.adapter_id} is for an encoder and a decoder, this model is a decoder")
    embeddings: Any = layout.model.get_input_embeddings()
    num_tokens = config.get("num_virtual_tokens")
    wanted: dict[str, tuple[Any, ...]] = {PROMPT_NAME: (num_tokens, embeddings.weight.shape[1])}
    if kind == DEEP_PROMPT_TUNING:
        wanted[DEEP_PROMPT_NAME] = (layout.num_blocks, num_tokens, layout.hidden_size)
    heads = _head_names(files, kind)
    given = files.shapes.keys() - heads.keys()
    if given != wanted.keys():
        raise CheckpointError(
            f"{files.adapter_id} holds {sorted(given)}, an adapter of the type {kind} {sorted(wanted)}"
        )
    for name, shape in wanted.items():
        if files.shapes[name] != shape or min(files.shapes[name]) < 1:
            raise CheckpointError(
                f"{files.adapter_id}: {name} has the shape {list(files.shapes[name])}, this model and its "
                f"num_virtual_tokens {num_tokens} want {list(shape)}"
            )
    tensors = _read(files, wanted)
    return LocalAdapter(
        config, tensors[PROMPT_NAME], tensors.get(DEEP_PROMPT_NAME), heads=_read_heads(files, heads, layout)
    )


def _head_names(files: AdapterFiles, kind: str) -> dict[str, str]:
    """For tensors of the modules to save, what the model calls them."""
    modules = tuple(f"{name}." for name in files.config.get("modules_to_save") or ())
    prefix = TENSOR_PREFIXES[kind]
    return {
        name: name.removeprefix(prefix)
        for name in files.shapes
        if name.startswith(prefix) and name.removeprefix(prefix).startswith(modules)
    }


def _read_heads(files: AdapterFiles, names: Mapping[str, str], layout: Layout) -> dict[str, torch.Tensor]:
    held = {name: tuple(tensor.shape) for name, tensor in layout.model.state_dict().items()}
    for name, in_model in names.items():
        if in_model not in held:
            raise CheckpointError(
                f"{files.adapter_id} was trained with {in_model}, which a {type(layout.model).__name__} does not have"
            )
        # The number of labels is that of the model at hand, which knows better than the config.
        if files.shapes[name][1:] != held[in_model][1:]:
            raise CheckpointError(
                f"{files.adapter_id}: {name} has the shape {list(files.shapes[name])}, this model wants "
                f"{list(held[in_model])}"
            )
    tensors = _read(files, names)
    return {in_model: tensors[name] for name, in_model in names.items()}


def _read(files: AdapterFiles, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Copies in float32, so that the files may change or go."""
    tensors = files.read(names)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(f"{files.adapter_id}: {name} holds values that are not finite floats")
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}


class _WithoutHeads:
    """The same adapter as it would be without modules trained beside it: what `fit_adapter` is about."""

    def __init__(self, files: AdapterFiles, heads: Collection[str]) -> None:
        self._files = files
        self.adapter_id = files.adapter_id
        self.config: Mapping[str, Any] = {**files.config, "modules_to_save": None}
        self.shapes = {name: shape for name, shape in files.shapes.items() if name not in heads}

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        return self._files.read(names)

    def release(self) -> None:
        self._files.release()
