"""Weights into a model without any, by transformers' own renaming and conversion rules.

Only what the model still holds is read: by the time of loading, stand-ins without weights are where other peers'
parts were.
"""

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from p2pswarm.blocks.weight_source import WeightSource
from p2pswarm.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.loading_report import LoadStateDictInfo

LANGUAGE_MODEL_NAMES = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.(model\.)?": "model.",
}
"""How models that also see or hear call the tensors of their language model, and how it calls them by itself."""

NAMES_IN_MESSAGE = 8
"""How many tensors an error lists; a wrong checkpoint may lack thousands."""

LOADING = threading.Lock()
"""Held while a model is made and filled: transformers patches its own globals meanwhile, so that two models loaded at
once in two threads would come out with weights missing."""


def load_weights(model: "PreTrainedModel", source: WeightSource, *, dtype: torch.dtype, device: torch.device) -> None:
    """Fills every parameter and buffer of the model. Raises `CheckpointError` when a tensor is missing or has another
    shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    held = model.state_dict()
    model.all_tied_weights_keys = {
        target: origin for target, origin in model.all_tied_weights_keys.items() if target in held and origin in held
    }
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model, LANGUAGE_MODEL_NAMES),  # type: ignore[arg-type]
    )
    with without_progress_bars():
        tensors = source.read(_needed(source.tensor_names, model, held))
        report, _ = convert_and_load_state_dict_in_model(model, tensors, config)
    _check(report, model, source.name)
    model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
    if unfilled := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise CheckpointError(f"{source.name} lacks {_listed(unfilled)}")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    model.requires_grad_(False)


def _needed(tensor_names: Collection[str], model: "PreTrainedModel", held: dict[str, Any]) -> list[str]:
    """The tensors of a checkpoint that end up in what the model holds, whatever they are called and merged into."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model, LANGUAGE_MODEL_NAMES)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    needed = []
    # In this order, since some renaming rules depend on what they have met before.
    for name in sorted(tensor_names, key=dot_natural_key):
        target, _ = rename_source_key(name, renamings, converters, prefix, held)
        if target in held or rename_source_key(name, [], [], prefix, held)[0] in held:
            needed.append(name)
    return needed


def _check(report: "LoadStateDictInfo", model: "PreTrainedModel", source_name: str) -> None:
    """Raises `CheckpointError` for whatever of the model the checkpoint did not fill."""
    if report.conversion_errors:
        name, reason = next(iter(report.conversion_errors.items()))
        raise CheckpointError(f"{source_name}: the tensor {name} cannot be converted: {reason}")
    if report.mismatched_keys:
        name, got, wanted = sorted(report.mismatched_keys)[0]
        raise CheckpointError(
            f"{source_name}: {name} has the shape {list(got)}, its config wants {list(wanted)} "
            f"({len(report.mismatched_keys)} tensors differ)"
        )
    model._adjust_missing_and_unexpected_keys(report)
    tied = model.all_tied_weights_keys
    filled_by_tying = {name for pair in tied.items() for name in pair if not report.missing_keys.issuperset(pair)}
    if missing := sorted(report.missing_keys - filled_by_tying):
        raise CheckpointError(f"{source_name} lacks {_listed(missing)}")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_IN_MESSAGE]) + (", ..." if len(names) > NAMES_IN_MESSAGE else "")
    return f"{len(names)} tensors that its config calls for: {shown}"


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keeps transformers from drawing a bar for each span it loads."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
