"""Linear layers that compute with the adapter of whoever's states go through them, or without one.

A layer stays what it is, packed or quantized, and keeps its weights; its class is replaced by one that adds the
low-rank product to what it answered before. Layers that no adapter changes are not touched.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from p2pswarm.blocks.adapters import LoadedAdapter, LowRank


class ActiveAdapter:
    """Which adapter the layers of a span compute with just now."""

    __slots__ = ("adapter_id", "known")

    def __init__(self, known: Sequence[str]) -> None:
        self.known = tuple(known)
        self.adapter_id: str | None = None

    def choose(self, adapter_id: str | None) -> None:
        """From now on, that one; None: none."""
        if adapter_id is not None and adapter_id not in self.known:
            raise ValueError(f"the span has the adapters {', '.join(self.known) or 'none'}, not {adapter_id}")
        self.adapter_id = adapter_id


class AdaptedLayer(nn.Module):
    """Mixed in front of a layer's own class."""

    low_ranks: Mapping[str | None, LowRank]
    """By adapter."""
    active: ActiveAdapter

    def forward(self, states: torch.Tensor) -> Any:
        output = super().forward(states)
        low_rank = self.low_ranks.get(self.active.adapter_id)
        if low_rank is None:
            return output
        return output + low_rank.product(states).to(output.dtype)


def adapt_layers(blocks: Mapping[int, nn.Module], adapters: Sequence[LoadedAdapter]) -> ActiveAdapter:
    """Gives the blocks their adapters; by what is returned, one of them is chosen. At first, none is."""
    active = ActiveAdapter([adapter.adapter_id for adapter in adapters])
    adapted_classes: dict[type[nn.Module], type[nn.Module]] = {}
    for index, block in blocks.items():
        by_path: dict[str, dict[str | None, LowRank]] = {}
        for adapter in adapters:
            for path, low_rank in adapter.blocks.get(index, {}).items():
                by_path.setdefault(path, {})[adapter.adapter_id] = low_rank
        for path, low_ranks in by_path.items():
            layer = block.get_submodule(path)
            kind = type(layer)
            if kind not in adapted_classes:
                adapted_classes[kind] = type(kind.__name__, (AdaptedLayer, kind), {"__module__": __name__})
            layer.__class__ = adapted_classes[kind]
            assert isinstance(layer, AdaptedLayer)
            layer.low_ranks, layer.active = low_ranks, active
    return active
