"""Attention for one token each of many sessions, whose keys and values lie in different places of one pool.

The linear layers of a model see one batch; between them each row attends to its own tokens alone, by the very function
that the model uses for a single session. Where that is plain attention, one kernel does it for all rows
(`attention_kernel.py`). A `RowsCache` hands the model, in place of tensors, `RowStates`, and `attend_by_rows`,
registered with transformers under a name of its own, takes them up. A model that does anything else with its keys in
between fails on them, which shows as soon as it is tried.

Since a row's tensors hold what its token may see and nothing else, no mask is needed: transformers makes none for
attention that has no mask function.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from p2pswarm.blocks.attention_kernel import find_attention_kernel
from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.blocks.kv_pool import KVPool, LayerStore
from p2pswarm.core.span import Span

Attend = Callable[..., tuple[torch.Tensor, Any]]

UNUSUAL_ARGUMENTS = ("softcap", "position_bias", "cache")
"""What transformers' function for `sdpa` heeds beside `scaling`; the rest is for others, or for several tokens."""
PREFIX = "rows_by_"
"""Before the name of the implementation that attends for each row."""


@dataclass(frozen=True, slots=True)
class Visible:
    """What the new token of each row may see."""

    places: Sequence[tuple[int, int] | torch.Tensor]
    """First slot and number of slots, or the slots of a row in pieces."""
    runs: torch.Tensor | None
    """First slots and numbers of slots, `[2, rows], int64`, on the CPU; None where a row is in pieces."""


class RowStates:
    """Keys, or values, of all rows in one layer, where they lie."""

    def __init__(self, stored: torch.Tensor, visible: Visible) -> None:
        """`stored: [heads, slots, head size]`."""
        self.stored = stored
        self.visible = visible

    def by_row(self) -> list[torch.Tensor]:
        """For each row `[1, heads, tokens, head size]`."""
        batched = self.stored[None]
        return [
            self.stored.index_select(1, place)[None] if isinstance(place, torch.Tensor) else batched.narrow(2, *place)
            for place in self.visible.places
        ]


class Rows:
    """Where the rows of some sessions lie in their pool, and how long they are once their new tokens are in."""

    def __init__(self, pool: KVPool, caches: Sequence[SpanCache], positions: Sequence[int]) -> None:
        """Room must have been made in each cache for one token at its position."""
        self._placed = [
            (cache.placement, row, position)
            for cache, position in zip(caches, positions, strict=True)
            for row in range(cache.num_sequences)
        ]
        self.longest = max(positions)
        slots = [placement.slot(row, position) for placement, row, position in self._placed]
        self._device = pool.device
        self.new_slots = torch.tensor(slots, device=pool.device)
        """[rows]: where the new tokens go."""
        self._visible: dict[int | None, Visible] = {}

    def visible(self, window: int | None) -> Visible:
        """What the new tokens may see, with this window."""
        if window not in self._visible:
            places = [self._visible_in_row(*placed, window) for placed in self._placed]
            whole = [place for place in places if isinstance(place, tuple)]
            runs = None if len(whole) < len(places) else torch.tensor(whole).t().contiguous()
            self._visible[window] = Visible(places, runs)
        return self._visible[window]

    def _visible_in_row(
        self, placement: Any, row: int, position: int, window: int | None
    ) -> tuple[int, int] | torch.Tensor:
        start = 0 if window is None else max(position + 1 - window, 0)
        first_slot = placement.first_slots[row]
        if first_slot is not None:
            return first_slot + start, position + 1 - start
        slots: torch.Tensor = placement.slots_of_row(row, start, position + 1)
        return slots.to(self._device)


class RowsLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values of all rows."""

    def __init__(self, rows: Rows, store: LayerStore, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = rows
        self._store = store
        self.window = window
        self.is_sliding = window is not None
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the pool has the memory."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **named_arguments: Any
    ) -> tuple[Any, Any]:
        """Writes one token a row; returns `RowStates`."""
        return self._written(self._store.keys, key_states), self._written(self._store.values, value_states)

    def _written(self, stored: torch.Tensor, states: torch.Tensor) -> RowStates:
        stored.index_copy_(1, self._rows.new_slots, states.squeeze(2).transpose(0, 1))
        return RowStates(stored, self._rows.visible(self.window))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._rows.longest + query_length, 0

    def get_seq_length(self) -> int:
        return self._rows.longest

    def get_max_length(self) -> int:
        return -1


class RowsCache(Cache):
    """What a model is given for a cache while it runs one token each of several sessions."""

    def __init__(self, rows: Rows, pool: KVPool, span: Span, windows: Sequence[int | None]) -> None:
        held = [RowsLayer(rows, pool.layers[index], windows[index]) for index in range(span.start, span.end)]
        elsewhere = {layer.window: layer for layer in reversed(held)}
        super().__init__(
            layers=[
                held[index - span.start] if span.covers(index) else elsewhere.get(window, held[0])
                for index, window in enumerate(windows)
            ]
        )


@contextmanager
def attention_by_rows(config: Any) -> Iterator[None]:
    """While it lasts, models of this config attend row by row."""
    implementation = config._attn_implementation
    name = f"{PREFIX}{implementation}"
    AttentionInterface.register(name, functools.partial(attend_by_rows, implementation))
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = implementation


def attend_by_rows(
    implementation: str,
    module: nn.Module,
    query: torch.Tensor,
    keys: RowStates,
    values: RowStates,
    attention_mask: torch.Tensor | None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """`query: [rows, heads, 1, head size]`; gives `[rows, 1, heads, _]`."""
    if not isinstance(keys, RowStates) or attention_mask is not None:
        raise TypeError("the model does not hand its keys, or no mask, to attention as it got them")
    if implementation == "sdpa" and not any(named.get(name) is not None for name in UNUSUAL_ARGUMENTS):
        return _attend_plainly(query, keys, values, named.get("scaling")), None
    attend = _attend(implementation, type(module))  # type: ignore[arg-type]
    outputs = [
        attend(module, row, row_keys, row_values, None, **named)[0]
        for row, row_keys, row_values in zip(torch.split(query, 1), keys.by_row(), values.by_row(), strict=True)
    ]
    return torch.cat(outputs), None


def _attend_plainly(query: torch.Tensor, keys: RowStates, values: RowStates, scaling: float | None) -> torch.Tensor:
    """What transformers makes of a single token with torch's attention."""
    kernel, runs = find_attention_kernel(), keys.visible.runs
    if runs is None or kernel is None or not kernel.is_for(query, keys.stored, values.stored):
        return _attend_by_sdpa(query, keys, values, scaling)
    return kernel.attend(query, keys.stored, values.stored, runs, scaling or query.shape[3] ** -0.5)


def _attend_by_sdpa(query: torch.Tensor, keys: RowStates, values: RowStates, scaling: float | None) -> torch.Tensor:
    """Without the 15 us a row of transformers' own: query heads that share keys become tokens."""
    num_rows, num_heads, _, head_size = query.shape
    num_key_heads = keys.stored.shape[0]
    queries = query.reshape(num_rows, num_key_heads, num_heads // num_key_heads, head_size)
    outputs = [
        F.scaled_dot_product_attention(row, row_keys, row_values, scale=scaling)
        for row, row_keys, row_values in zip(torch.split(queries, 1), keys.by_row(), values.by_row(), strict=True)
    ]
    return torch.cat(outputs).view(num_rows, 1, num_heads, -1)


@functools.cache
def _attend(implementation: str, module_class: type[nn.Module]) -> Attend:
    """The function that modules of this class use under that name; `eager` is each modelling file's own."""
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]
    for each in module_class.__mro__:
        eager = getattr(sys.modules.get(each.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager  # type: ignore[no-any-return]
    raise NotImplementedError(f"no eager attention is known for a {module_class.__name__}")
