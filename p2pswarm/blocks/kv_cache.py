"""The keys and values of one session in one span: a transformers `Cache` whose memory is pages of a pool.

Unlike transformers' own, it keeps every token, for sliding-window layers too, and lets those see only what is in
their window; so a session can be rolled back past the window, and the computation is the same as with the local
cache, bit for bit. A new token is written in its place; attention reads rows that lie in one piece where they are, and
a copy of rows that do not.

Pages change hands in `make_room` and `release`, which only count; tensors are touched by `update`, as a step runs.

Layers that other servers hold are in the list as well: each is a second name for a layer of the same kind in the
span, because models ask layers far from the span (the first one, often) how many tokens have passed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from p2pswarm.blocks.kv_pool import KVPool, LayerStore
from p2pswarm.blocks.page_tables import PageTables, pages_for
from p2pswarm.blocks.pages import PAGE_TOKENS, OutOfPages
from p2pswarm.core.span import Span

UNKNOWN_LENGTH_TOKENS = 256
"""What a session is expected to grow to when nobody says."""


class Placement:
    """Where the rows of a session lie in a pool's slots; a new one whenever pages change."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        """`rows`: the pages of each."""
        self.capacity = len(rows[0]) * PAGE_TOKENS
        self.first_slots = tuple(_first_slot(pages) for pages in rows)
        """Of each row; None where it is in pieces."""
        self._rows = [list(pages) for pages in rows]

    def row_stride(self) -> int | None:
        """Slots from each row to the next, where all are in one piece and evenly spaced."""
        first, *rest = self.first_slots
        if first is None:
            return None
        stride = rest[0] - first if rest and rest[0] is not None else 0
        is_even = all(slot == first + index * stride for index, slot in enumerate(self.first_slots))
        return stride if is_even and stride >= 0 else None

    def slots_of_row(self, row: int, start: int, end: int) -> torch.Tensor:
        """The slots of the row's tokens `[start, end)`, int64."""
        pages = torch.tensor(self._rows[row][start // PAGE_TOKENS : -(-end // PAGE_TOKENS)])
        slots = (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()
        return slots[start % PAGE_TOKENS :][: end - start]

    def slot(self, row: int, position: int) -> int:
        return self._rows[row][position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS


def _first_slot(pages: Sequence[int]) -> int | None:
    if not pages or list(pages) == list(range(pages[0], pages[0] + len(pages))):
        return pages[0] * PAGE_TOKENS if pages else 0
    return None


class PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's part in a session's pages, as `[batch, heads, tokens, head size]`."""

    def __init__(self, index: int, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.window = window
        """How many tokens, itself included, a token of a sliding or chunked layer may see; None: all."""
        self.is_sliding = window is not None
        self.is_initialized = True
        self.length = 0
        self._placement: Placement | None = None
        self._stored: tuple[torch.Tensor, torch.Tensor] | None = None
        """Of the layer in the pool."""
        self._in_place: tuple[torch.Tensor, torch.Tensor] | None = None
        """Views of the rows with room for tokens to come; None where they are in pieces."""

    @property
    def capacity(self) -> int:
        """How many tokens of each row have a place."""
        return self._placement.capacity if self._placement is not None else 0

    def place(self, store: LayerStore, placement: Placement) -> None:
        """Says where the rows lie from now on; on the device's thread, before a step."""
        self._placement, self._stored = placement, (store.keys, store.values)
        stride = placement.row_stride()
        if stride is None:
            self._in_place = None
            return
        first, num_rows = placement.first_slots[0], len(placement.first_slots)
        assert first is not None
        self._in_place = (
            _evenly_spaced(store.keys, first, stride, num_rows, placement.capacity),
            _evenly_spaced(store.values, first, stride, num_rows, placement.capacity),
        )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the pool has the memory."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **named_arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_new = key_states.shape[-2]
        start, end = self.length, self.length + num_new
        num_visible = self.get_mask_sizes(num_new)[0]
        assert end <= self.capacity, "room was not made"
        self.length = end
        if self._in_place is None:
            return self._update_pieces(key_states, value_states, end - num_visible)
        keys, values = self._in_place
        keys.narrow(2, start, num_new).copy_(key_states)
        values.narrow(2, start, num_new).copy_(value_states)
        return keys.narrow(2, end - num_visible, num_visible), values.narrow(2, end - num_visible, num_visible)

    def _update_pieces(
        self, key_states: torch.Tensor, value_states: torch.Tensor, visible_from: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._placement is not None
        assert self._stored is not None
        num_rows, _, num_new, _ = key_states.shape
        slots = torch.stack([self._placement.slots_of_row(row, visible_from, self.length) for row in range(num_rows)])
        slots = slots.to(key_states.device)
        new_slots, slots = slots[:, slots.shape[1] - num_new :].flatten(), slots.flatten()
        shown = []
        for stored, states in zip(self._stored, (key_states, value_states), strict=True):
            stored.index_copy_(1, new_slots, states.transpose(0, 1).flatten(1, 2))
            shown.append(stored.index_select(1, slots).view(len(stored), num_rows, -1, stored.shape[2]).transpose(0, 1))
        return shown[0], shown[1]

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


def _evenly_spaced(stored: torch.Tensor, first: int, stride: int, num_rows: int, capacity: int) -> torch.Tensor:
    """`[heads, slots, head size]` seen as `[rows, heads, capacity, head size]`."""
    num_heads, num_slots, head_size = stored.shape
    size, strides = (
        (num_rows, num_heads, capacity, head_size),
        (stride * head_size, num_slots * head_size, head_size, 1),
    )
    return stored.as_strided(size, strides, first * head_size)


class SpanCache(Cache):
    """The caches of a span's layers for `batch_size` sequences of the same length; used by one thread at a time."""

    def __init__(
        self,
        span: Span,
        windows: Sequence[int | None],
        pool: KVPool,
        batch_size: int,
        max_length: int | None = None,
        *,
        pool_grows: bool = False,
    ) -> None:
        """`windows`: for each layer of the whole model, how far it sees, None for all tokens.

        `pool_grows`: the pool is this cache's own, and is made larger when it is full.
        """
        self.num_sequences = batch_size
        self.pool = pool
        self.span = span
        self.held = [PagedLayer(index, windows[index]) for index in range(span.start, span.end)]
        self._tables = PageTables(pool.pages, batch_size, max_length or UNKNOWN_LENGTH_TOKENS)
        self._pool_grows = pool_grows
        self._placement: Placement | None = None
        self._placed: tuple[Placement, object] | None = None
        """The placement that the layers know, and the pool's memory at that time."""
        super().__init__(layers=[self._layer_like(span, windows, index) for index in range(len(windows))])

    def _layer_like(self, span: Span, windows: Sequence[int | None], index: int) -> PagedLayer:
        if span.covers(index):
            return self.held[index - span.start]
        return next((layer for layer in self.held if layer.window == windows[index]), self.held[0])

    @property
    def length(self) -> int:
        """Tokens that have passed through the whole span; layers that are further have failed halfway."""
        return min(layer.length for layer in self.held)

    @property
    def num_pages(self) -> int:
        """Pages of the pool that it holds; one that several rows share counts once."""
        return self._tables.num_pages

    @property
    def size_bytes(self) -> int:
        return self.num_pages * self.pool.page_bytes

    @property
    def placement(self) -> Placement:
        """Where the rows lie. Room must have been made."""
        assert self._placement is not None, "room was not made"
        return self._placement

    def pages_needed(self, position: int, num_tokens: int, beam_indices: Sequence[int] | None = None) -> int:
        """How many free pages `make_room` would take, all in all; below 0: how many it would give back."""
        self._check(position, beam_indices)
        return self._tables.pages_needed(position, num_tokens, beam_indices)

    def make_room(self, position: int, num_tokens: int, beam_indices: Sequence[int] | None = None) -> None:
        """Forgets every token from `position` on, and holds the pages for `num_tokens` tokens from there, no others.

        With `beam_indices`, row i becomes what row `beam_indices[i]` was, first. Only counts: what has to be copied is
        done before the next step. Raises `OutOfPages`, and nothing has changed. Asked again, it does nothing.
        """
        self._check(position, beam_indices)
        if beam_indices is None and self._tables.fits(position, num_tokens):
            self.crop(position)
            return
        try:
            copies = self._tables.make_room(position, num_tokens, beam_indices)
        except OutOfPages as error:
            if not self._pool_grows:
                raise
            self.pool.extend(max(error.num_missing, self.pool.num_pages))
            copies = self._tables.make_room(position, num_tokens, beam_indices)
        self.pool.list_copies(copies)
        self._placement = Placement([row.pages for row in self._tables.rows])
        self.crop(position)

    def place(self) -> None:
        """On the device's thread, before a step: makes the copies that are due, and shows the layers their rows."""
        self.pool.carry_out()
        placed = (self.placement, self.pool.layers)
        if self._placed is None or self._placed[0] is not placed[0] or self._placed[1] is not placed[1]:
            for layer in self.held:
                layer.place(self.pool.layers[layer.index], self.placement)
            self._placed = placed

    def advance(self, num_tokens: int) -> None:
        """Notes that so many tokens more, for which there is room, have been written in every layer."""
        for layer in self.held:
            layer.length += num_tokens

    def crop(self, length: int) -> None:
        """Forgets every token from position `length` on, but keeps their pages for tokens to come."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be cut to {length}")
        for layer in self.held:
            layer.cut(length)

    def reorder(self, beam_indices: torch.Tensor) -> None:
        """Makes row i what row `beam_indices[i]` was; `beam_indices: [batch], int64`."""
        self.make_room(self.length, 0, beam_indices.tolist())

    def release(self) -> None:
        """Gives all pages back; a second time does nothing."""
        self.crop(0)
        self._tables.release()
        self._placement = None

    def _check(self, position: int, beam_indices: Sequence[int] | None) -> None:
        if not 0 <= position <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot go on at position {position}")
        if beam_indices is not None and len(beam_indices) != self.num_sequences:
            raise ValueError(f"a cache of {self.num_sequences} rows cannot take {len(beam_indices)} beam indices")


def own_pool_pages(batch_size: int, max_length: int | None) -> int:
    """What a cache's own pool begins with."""
    return batch_size * pages_for(min(max_length or UNKNOWN_LENGTH_TOKENS, UNKNOWN_LENGTH_TOKENS))
