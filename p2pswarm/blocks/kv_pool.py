"""The memory for keys and values of all sessions of a span, taken once and handed out by pages.

Every layer has one tensor of keys and one of values, `[heads, slots, head size]`; a page is the same `PAGE_TOKENS`
slots in each. A row whose pages follow one another is a slice of it, which attention reads as fast as a tensor of its
own. On a CPU memory becomes resident only where it is written, so what nobody has used yet costs nothing.

Pages are taken and given back (`pages.py`) by whoever plans the steps; what has to be copied for it is listed here, and
done on the device's thread before the next step, in order. So pages must not change hands while a step runs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from p2pswarm.blocks.page_tables import SlotCopy
from p2pswarm.blocks.pages import PAGE_TOKENS, PagePool


@dataclass(frozen=True, slots=True)
class StateShape:
    """Keys, or values, of one token in one layer."""

    num_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return self.num_heads * self.head_size * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of one token."""

    keys: StateShape
    values: StateShape

    @property
    def size_bytes(self) -> int:
        return self.keys.size_bytes + self.values.size_bytes


class LayerStore:
    """Keys and values of one layer, each `[heads, slots, head size]`."""

    def __init__(self, shape: LayerShape, num_slots: int, device: torch.device) -> None:
        self.keys, self.values = (
            torch.empty(states.num_heads, num_slots, states.head_size, dtype=states.dtype, device=device)
            for states in (shape.keys, shape.values)
        )

    def copy(self, copies: Iterable[SlotCopy]) -> None:
        for stored in (self.keys, self.values):
            for each in copies:
                stored.narrow(1, each.target, each.num_slots).copy_(stored.narrow(1, each.source, each.num_slots))


class KVPool:
    """`num_pages` pages of the given layers."""

    def __init__(self, layer_shapes: Mapping[int, LayerShape], num_pages: int, device: torch.device) -> None:
        """`layer_shapes`: by the block's index in the model."""
        self.pages = PagePool(num_pages)
        self.page_bytes = PAGE_TOKENS * sum(shape.size_bytes for shape in layer_shapes.values())
        self.layers: dict[int, LayerStore] = {}
        self.num_copied_bytes = 0
        """So far, for rows that moved and beams that parted."""
        self._layer_shapes = dict(layer_shapes)
        self.device = device
        self._copies: list[SlotCopy] = []
        self._allocate()

    @property
    def num_pages(self) -> int:
        return self.pages.num_pages

    @property
    def num_tokens(self) -> int:
        """Room, in tokens."""
        return self.num_pages * PAGE_TOKENS

    @property
    def size_bytes(self) -> int:
        """Of all pages, used or not."""
        return self.num_pages * self.page_bytes

    @property
    def used_bytes(self) -> int:
        return self.pages.num_used * self.page_bytes

    def list_copies(self, copies: Iterable[SlotCopy]) -> None:
        """Notes what `carry_out` is to copy, after what is listed already."""
        self._copies += copies

    def carry_out(self) -> None:
        """On the device's thread, before a step: makes the copies listed."""
        if self._copies:
            copies, self._copies = self._copies, []
            for layer in self.layers.values():
                layer.copy(copies)
            self.num_copied_bytes += sum(each.num_slots for each in copies) * (self.page_bytes // PAGE_TOKENS)

    def extend(self, num_pages: int) -> None:
        """Adds pages, at the cost of copying all that is stored."""
        old_layers, num_slots = self.layers, self.num_tokens
        self.pages.extend(num_pages)
        self._allocate()
        for index, old in old_layers.items():
            self.layers[index].keys[:, :num_slots] = old.keys
            self.layers[index].values[:, :num_slots] = old.values

    def _allocate(self) -> None:
        # Not within a step's inference mode: what is made there could not be written outside of it.
        with torch.inference_mode(False):
            self.layers = {
                index: LayerStore(shape, self.num_tokens, self.device) for index, shape in self._layer_shapes.items()
            }
