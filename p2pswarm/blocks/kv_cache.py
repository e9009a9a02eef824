"""The keys and values of one session in one span: a transformers `Cache` that can be cut back to any length.

Unlike transformers' own, it keeps every token, for sliding-window layers too, and lets those see only what is in
their window; so a session can be rolled back past the window, and the computation is the same as with the local
cache, bit for bit. Memory is taken in steps, so that a new token is written in its place and nothing is copied.

Layers that other servers hold are in the list as well: each is a second name for a layer of the same kind in the
span, because models ask layers far from the span (the first one, often) how many tokens have passed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from p2pswarm.core.span import Span

FIRST_CAPACITY_TOKENS = 128
LARGEST_GROWTH_TOKENS = 2048
"""Capacity doubles up to here and grows by so much from then on, so that little memory is taken in vain."""


class GrowingLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, `[batch, heads, tokens, head size]`, with room for tokens to come."""

    def __init__(self, window: int | None = None, max_length: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.max_length = max_length
        """Where growing ahead of need stops; None: nowhere."""
        self.window = window
        """How many tokens, itself included, a token of a sliding or chunked layer may see; None: all."""
        self.is_sliding = window is not None
        self.length = 0
        self._stored: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def capacity(self) -> int:
        return self._stored[0].shape[-2] if self._stored is not None else 0

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._stored or ())

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._stored = tuple(  # type: ignore[assignment]
            states.new_empty((*states.shape[:-2], 0, states.shape[-1])) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **named_arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._stored is None:
            self.lazy_initialization(key_states, value_states)
        num_new = key_states.shape[-2]
        self._make_room(self.length + num_new)
        assert self._stored is not None
        start, end = self.length, self.length + num_new
        visible_from = end - self.get_mask_sizes(num_new)[0]
        self.length = end
        keys, values = self._stored
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        return keys[..., visible_from:end, :], values[..., visible_from:end, :]

    def _make_room(self, length: int) -> None:
        capacity = self.capacity
        if length <= capacity:
            return
        grown = max(FIRST_CAPACITY_TOKENS, min(2 * capacity, capacity + LARGEST_GROWTH_TOKENS), length)
        if self.max_length is not None:
            grown = max(min(grown, self.max_length), length)
        self._store(*(self._resized(tensor, grown) for tensor in self._stored or ()))

    def _resized(self, tensor: torch.Tensor, capacity: int) -> torch.Tensor:
        resized = tensor.new_empty((*tensor.shape[:-2], capacity, tensor.shape[-1]))
        resized[..., : self.length, :] = tensor[..., : self.length, :]
        return resized

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._stored = keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys new tokens see, and the position of the first of them."""
        first = 0 if self.window is None else max(self.length - self.window + 1, 0)
        return self.length + query_length - first, first

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def cut(self, length: int) -> None:
        self.length = min(length, self.length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self._stored is not None:
            self._store(*(tensor.index_select(0, beam_idx.to(tensor.device)) for tensor in self._stored))


class SpanCache(Cache):
    """The caches of a span's layers for `batch_size` sequences of the same length; used by one thread at a time."""

    def __init__(
        self, span: Span, windows: Sequence[int | None], batch_size: int, max_length: int | None = None
    ) -> None:
        """`windows`: for each layer of the whole model, how far it sees, None for all tokens."""
        self.num_sequences = batch_size
        self.held = [GrowingLayer(windows[index], max_length) for index in range(span.start, span.end)]
        super().__init__(layers=[self._layer_like(span, windows, index) for index in range(len(windows))])

    def _layer_like(self, span: Span, windows: Sequence[int | None], index: int) -> GrowingLayer:
        if span.covers(index):
            return self.held[index - span.start]
        return next((layer for layer in self.held if layer.window == windows[index]), self.held[0])

    @property
    def length(self) -> int:
        """Tokens that have passed through the whole span; layers that are further have failed halfway."""
        return min(layer.length for layer in self.held)

    @property
    def size_bytes(self) -> int:
        """Memory taken, room for tokens to come included."""
        return sum(layer.size_bytes for layer in self.held)

    def crop(self, length: int) -> None:
        """Forgets every token from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be cut to {length}")
        for layer in self.held:
            layer.cut(length)

    def reorder(self, beam_indices: torch.Tensor) -> None:
        """Makes row i what row `beam_indices[i]` was; `beam_indices: [batch], int64`."""
        if beam_indices.shape != (self.num_sequences,):
            raise ValueError(
                f"a cache of {self.num_sequences} rows cannot take {list(beam_indices.shape)} beam indices"
            )
        for layer in self.held:
            layer.reorder_cache(beam_indices)
