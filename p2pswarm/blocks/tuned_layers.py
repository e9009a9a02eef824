"""Linear layers that compute with a caller's low-rank pairs while a run of that caller lasts.

For that time a layer's class is replaced by one that adds the pair's product to whatever the layer answers: packed,
quantized, or changed by an adapter of the server's own. Between such runs every layer is what it was, so runs without
a tuning pay nothing for it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from p2pswarm.blocks.adapters import LowRank


class TunedLayer(nn.Module):
    """Mixed in front of a layer's own class."""

    tuned_by: LowRank

    def __call__(self, states: torch.Tensor) -> Any:
        output = super().__call__(states)  # not `forward`, which the class of a lean module has in its `__call__`
        return output + self.tuned_by.product(states).to(output.dtype)


class TunedLayers:
    """The layers of some blocks, none of which is tuned until `applied`. Used by one thread."""

    def __init__(self, blocks: Mapping[int, nn.Module]) -> None:
        self._blocks = blocks
        self._tuned_classes: dict[type[nn.Module], type[nn.Module]] = {}

    @contextmanager
    def applied(self, layers: Mapping[int, Mapping[str, LowRank]]) -> Iterator[None]:
        """While it lasts, these layers compute with these pairs; they must be those of a tuning that was fitted."""
        classes: list[tuple[nn.Module, type[nn.Module]]] = []
        try:
            for index, pairs in layers.items():
                for path, pair in pairs.items():
                    layer = self._blocks[index].get_submodule(path)
                    classes.append((layer, type(layer)))
                    layer.__dict__["tuned_by"] = pair
                    layer.__class__ = self._tuned_class(type(layer))
            yield
        finally:
            for layer, kind in reversed(classes):
                layer.__class__ = kind
                layer.__dict__.pop("tuned_by", None)

    def _tuned_class(self, kind: type[nn.Module]) -> type[nn.Module]:
        if kind not in self._tuned_classes:
            self._tuned_classes[kind] = type(kind.__name__, (TunedLayer, kind), {"__module__": __name__})
        return self._tuned_classes[kind]
