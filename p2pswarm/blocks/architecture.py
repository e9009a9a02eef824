"""How a model is laid out, found by looking at it: where its blocks are, and whether it can be cut between them.

A transformers model is built without weights. Its blocks are the one list of as many modules as
its config has layers. What cannot be cut is refused here, with the reason; `REFUSALS` holds the model types for which
only experience tells (`docs/architectures.md` is made by trying them all).
"""

import copy
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from p2pswarm.blocks.refusals import REFUSALS
from p2pswarm.core.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layers whose memory is keys and values of every token, which can be cut off at any length."""

RECURRENT = "remember a running state, which cannot be rolled back to an earlier token"
COMPRESSED = "attend to compressed or selected tokens, and keep more than keys and values of each token for it"
REASONS_AGAINST_KINDS: Mapping[str, str] = {
    "linear_attention": RECURRENT,
    "conv": RECURRENT,
    "hybrid": RECURRENT,
    "hybrid_sliding": RECURRENT,
    "indexed_attention": COMPRESSED,
    "compressed_sparse_attention": COMPRESSED,
    "heavily_compressed_attention": COMPRESSED,
    "dummy": "have no attention of their own, or use the keys and values of a layer that another server may hold",
}


class Head(Enum):
    """What follows the last block and its norm; the value says it in messages."""

    CAUSAL_LM = "causal language model"
    SEQUENCE_CLASSIFICATION = "sequence classifier"
    NONE = "base model"


@dataclass(frozen=True, slots=True)
class Layout:
    """A model without weights, and where its parts are."""

    model: "PreTrainedModel"
    """Of transformers' class for the head, its parameters on the meta device."""
    blocks_path: str
    """Where the block list is within `model`, dotted."""
    num_blocks: int
    hidden_size: int

    @property
    def decoder(self) -> nn.Module:
        """The part of the model whose `forward` runs the blocks, one after the other."""
        return self.model.get_submodule(self.blocks_path.rpartition(".")[0])

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.blocks_path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks


def lay_out(config: "PretrainedConfig", dtype: torch.dtype, head: Head = Head.CAUSAL_LM) -> Layout:
    """Builds the model of a config without weights. Raises `UnsupportedModelError` where it cannot be cut.

    Of a model that also sees or hears, only the language model is built.
    """
    check_config(config)
    text_config = copy.deepcopy(config.get_text_config(decoder=True))  # models change theirs, even while they run
    model = _build(_model_class(text_config, head), text_config, dtype)
    num_blocks = int(text_config.num_hidden_layers)
    layout = Layout(model, _find_blocks(model, num_blocks), num_blocks, int(text_config.hidden_size))
    _check_decoder(layout.decoder)
    return layout


def check_config(config: "PretrainedConfig") -> None:
    """Raises `UnsupportedModelError` for what the config alone shows to be impossible."""
    text_config = config.get_text_config(decoder=True)
    for model_type in (config.model_type, text_config.model_type):
        if reason := REFUSALS.get(model_type):
            raise UnsupportedModelError(f"a {model_type} model cannot be cut into spans: {reason}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"a {config.model_type} model is an encoder and a decoder; only decoders can be cut into spans"
        )
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UnsupportedModelError(
            f"the weights are quantised already ({getattr(method, 'value', method)}), which is not supported; "
            "use the original model"
        )
    if not isinstance(getattr(text_config, "num_hidden_layers", None), int):
        raise UnsupportedModelError(f"a {config.model_type} model has no plain stack of layers (no num_hidden_layers)")
    if getattr(text_config, "hidden_size_per_layer_input", 0):
        raise UnsupportedModelError(
            f"the blocks of this {config.model_type} model are told more of each token than its hidden state "
            "(hidden_size_per_layer_input), which a server cannot know"
        )
    for kind in sorted(set(layer_kinds(text_config)) - ATTENTION_KINDS):
        reason = REASONS_AGAINST_KINDS.get(kind, "are unknown here")
        raise UnsupportedModelError(f"some layers of a {config.model_type} model ({kind}) {reason}")


def layer_kinds(text_config: "PretrainedConfig") -> list[str]:
    """What each layer remembers, in transformers' words (`full_attention`, `sliding_attention`, ...)."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    try:
        return list(get_layer_types_and_kwargs(text_config)[0])
    except (ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"transformers cannot say what a {text_config.model_type} model keeps: {error}"
        ) from error


def layer_windows(config: "PretrainedConfig") -> list[int | None]:
    """For each layer, how many tokens, itself included, a token may see; None for all."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    _, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return [option.get("sliding_window") for option in options]


def _model_class(config: "PretrainedConfig", head: Head) -> type["PreTrainedModel"]:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    classes: dict[Head, Any] = {
        Head.CAUSAL_LM: AutoModelForCausalLM,
        Head.SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
        Head.NONE: AutoModel,
    }
    try:
        found: Any = classes[head]._model_mapping[type(config)]
    except KeyError as error:
        raise UnsupportedModelError(f"transformers has no {head.value} of the type {config.model_type}") from error
    model_class: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return model_class


def _build(model_class: type["PreTrainedModel"], config: "PretrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import initialization
    from transformers.modeling_utils import local_torch_dtype

    with local_torch_dtype(dtype), initialization.no_init_weights(), parameters_without_memory():
        model = model_class(config)
    model.train(False)
    return model


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Modules made in this thread get their parameters on the meta device, and their buffers as ever.

    Making all of a module on the meta device would lose the buffers' values, and needs torch's compiler.
    """
    register = nn.Module.register_parameter
    thread = threading.get_ident()

    def register_without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == thread:
            empty = torch.empty_like(parameter, device="meta")
            parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _check_decoder(decoder: nn.Module) -> None:
    """Raises `UnsupportedModelError` unless hidden states and a cache can be handed to it."""
    parameters = inspect.signature(decoder.forward).parameters
    missing = sorted({"inputs_embeds", "past_key_values"} - parameters.keys())
    if missing:
        raise UnsupportedModelError(
            f"the blocks are run by a {type(decoder).__name__}, which does not take {' and '.join(missing)}"
        )


def _find_blocks(model: nn.Module, num_blocks: int) -> str:
    """The path of the outermost list of `num_blocks` modules of one kind."""
    found: list[tuple[int, str]] = [
        (name.count("."), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks
    ]
    if not found:
        raise UnsupportedModelError(f"a {type(model).__name__} has no list of its {num_blocks} blocks")
    depth = min(found)[0]
    outermost = [name for at, name in found if at == depth]
    if len(outermost) > 1:
        raise UnsupportedModelError(
            f"a {type(model).__name__} has more than one list of {num_blocks} blocks: {', '.join(outermost)}"
        )
    return outermost[0]
