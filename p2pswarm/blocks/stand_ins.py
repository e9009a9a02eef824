"""Modules without weights that take the place of what a span or a client does not hold.

A model's own code runs around them unchanged: it indexes its layer list, embeds, adds positions and normalises as
ever, and what these modules answer is either what came in or zeros.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class LayerOutput(torch.Tensor):
    """Hidden states that a model may also take for the tuple some layers return: `output[0]` and unpacking both work.

    Every operation on it gives a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        plain = self.as_subclass(torch.Tensor)
        if index == 0 and isinstance(index, int):
            return plain
        return plain[index]

    def __iter__(self) -> Iterator[Any]:
        yield self.as_subclass(torch.Tensor)
        yield None


def as_layer_output(hidden_states: torch.Tensor) -> torch.Tensor:
    """The hidden states in the shape of whatever the model expects of a layer."""
    if type(hidden_states) is LayerOutput:
        return hidden_states
    return hidden_states.as_subclass(LayerOutput)


class PassThrough(nn.Module):
    """A layer that returns the hidden states it is given, with the settings of the layer it replaces."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        copy_settings(replaced, self)

    def __call__(self, hidden_states: torch.Tensor, *arguments: Any, **named_arguments: Any) -> torch.Tensor:
        # Past torch's call machinery: a span of a deep model is mostly these.
        return as_layer_output(hidden_states)


class BlockList(nn.ModuleList):
    """A list of blocks of which a slice is a plain list: models slice theirs for every token, which takes 0.1 ms."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self._modules.values())[index]
        return super().__getitem__(index)


class NoEmbedding(nn.Module):
    """An embedding of which nothing is known: zeros, which broadcast against any batch."""

    def __init__(self, replaced: nn.Embedding) -> None:
        super().__init__()
        copy_settings(replaced, self)
        self.embedding_dim = replaced.embedding_dim
        self.dtype = replaced.weight.dtype

    def forward(self, *arguments: Any, **named_arguments: Any) -> torch.Tensor:
        given = next(value for value in (*arguments, *named_arguments.values()) if isinstance(value, torch.Tensor))
        return torch.zeros(self.embedding_dim, dtype=self.dtype, device=given.device)


class NoProjection(nn.Module):
    """A linear layer of which nothing is known: zeros of its output size."""

    def __init__(self, replaced: nn.Linear) -> None:
        super().__init__()
        self.out_features = replaced.out_features

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(*states.shape[:-1], self.out_features)


class Unchanged(nn.Module):
    """Returns its first argument: what a norm or a head without weights does."""

    def forward(self, states: torch.Tensor, *arguments: Any, **named_arguments: Any) -> torch.Tensor:
        return states


def copy_settings(replaced: nn.Module, stand_in: nn.Module) -> None:
    """Gives the stand-in the plain attributes (`attention_type`, `is_sliding`, `embed_dim`) that model code may ask
    for.
    """
    for name, value in vars(replaced).items():
        if not name.startswith("_") and name != "training" and isinstance(value, str | int | float | bool | None):
            setattr(stand_in, name, value)


def empty_outside(model: nn.Module, kept_path: str) -> None:
    """Replaces every module with parameters of its own that is not under `kept_path`."""
    replaced: list[str] = []
    for name, module in list(model.named_modules()):
        if any(name == path or name.startswith(f"{path}.") for path in (kept_path, *replaced)):
            continue
        if name and next(module.parameters(recurse=False), None) is not None:
            model.set_submodule(name, _stand_in(module))
            replaced.append(name)


def _stand_in(module: nn.Module) -> nn.Module:
    match module:
        case nn.Embedding():
            return NoEmbedding(module)
        case nn.Linear():
            return NoProjection(module)
        case _:
            return Unchanged()
