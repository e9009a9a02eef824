"""The client's half of the dual caches: what every hop of a chain was sent since position 0.

A server's half are the keys and values that it computed from it. When a server is lost, a stand-in is sent the same
inputs again, all of them from position 0 on, and so comes to the same keys and values (2312.08361, Algorithm 1).
Plain tensors; knows nothing of servers.

Inputs are kept by boundary: the block that they go into. The first boundary holds what the session was given and is
always kept. When all boundaries together would take more than `max_bytes`, the last ones are let go: what they held can
be had again by replaying the blocks before them.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from p2pswarm.client.step_input import StepInput

FIRST_CAPACITY_TOKENS = 64


Key = str | int
"""A boundary, or `mask` or `position_ids`, which are the same at all of them."""


@dataclass(frozen=True, slots=True)
class Column:
    """Something of every token."""

    values: torch.Tensor
    """[batch, capacity, ...]"""
    filled: int
    """Tokens of each sequence that it holds, from position 0 on."""

    def at_most(self, length: int) -> "Column":
        return self if self.filled <= length else Column(self.values, length)


@dataclass(frozen=True, slots=True)
class Before:
    """What a history was when a step began, for going back to when the step is given up."""

    length: int
    columns: dict[Key, Column]


class InputHistory:
    """The inputs of `batch_size` sequences. A step is begun, then put in boundary by boundary, then committed."""

    def __init__(self, batch_size: int, max_length: int, *, max_bytes: int, dtype: torch.dtype | None = None) -> None:
        """`dtype`: what hidden states are kept in, if not as they were sent; a narrower one costs exactness."""
        self.batch_size = batch_size
        self.length = 0
        """Tokens of each sequence that were committed."""
        self._max_length = max_length
        self._max_bytes = max_bytes
        self._dtype = dtype
        self._columns: dict[Key, Column] = {}

    @property
    def boundaries(self) -> list[int]:
        """Whose inputs can be replayed."""
        return [key for key in self._columns if isinstance(key, int) and self.remembers(key)]

    @property
    def size_bytes(self) -> int:
        return sum(column.values.nbytes for column in self._columns.values())

    def remembers(self, boundary: int) -> bool:
        """Whether the boundary can be replayed. Where there are no tokens yet, every one can."""
        column = self._columns.get(boundary)
        return self.length == 0 or (column is not None and column.filled >= self.length)

    def before(self, step: StepInput) -> Before:
        """For `give_up`: the tokens that come before the step."""
        return Before(step.position, self._first_tokens(step.position))

    def begin(self, step: StepInput) -> None:
        """Goes back to the step's position and follows its beams."""
        self.length = step.position
        self._columns = self._first_tokens(step.position)
        if step.beam_indices is not None:
            for key, column in self._columns.items():
                self._columns[key] = Column(column.values.index_select(0, step.beam_indices), column.filled)
        self._put_extra("mask", step.attention_mask, step)
        self._put_extra("position_ids", step.position_ids, step)

    def put(self, boundary: int, position: int, hidden_states: torch.Tensor) -> None:
        """Keeps what went into block `boundary` from `position` on; [batch, tokens, hidden].

        Without effect where the tokens before are not kept.
        """
        column = self._columns.get(boundary)
        if position <= (column.filled if column is not None else 0):
            self._write(boundary, position, self._as_kept(hidden_states))
            self._stay_within_bounds()

    def commit(self, length: int) -> None:
        """From now on `length` tokens are kept."""
        self.length = length

    def give_up(self, before: Before) -> None:
        """As it was before the step that `before` came from, but for going back to its position."""
        self.length = before.length
        self._columns = before.columns

    def forget_all_but(self, boundaries: Collection[int]) -> None:
        """Lets go of inputs that nobody will ask for."""
        for key in list(self._columns):
            if isinstance(key, int) and key not in boundaries:
                del self._columns[key]

    def replay(self, boundary: int) -> StepInput:
        """All inputs of the boundary, as one step from position 0 on."""
        states, mask, position_ids = (self._kept(key) for key in (boundary, "mask", "position_ids"))
        assert states is not None, f"boundary {boundary} is not remembered"
        return StepInput(states, 0, mask, position_ids)

    def mask(self, length: int) -> torch.Tensor | None:
        """bool [batch, length]: which of the first tokens count, those of the step that was begun included; None: all
        of them."""
        column = self._columns.get("mask")
        return None if column is None else column.values[:, :length]

    def _first_tokens(self, length: int) -> dict[Key, Column]:
        return {key: column.at_most(length) for key, column in self._columns.items()} if length else {}

    def _kept(self, key: Key) -> torch.Tensor | None:
        column = self._columns.get(key)
        return None if column is None else column.values[:, : self.length]

    def _as_kept(self, hidden_states: torch.Tensor) -> torch.Tensor:
        detached = hidden_states.detach()
        return detached if self._dtype is None else detached.to(self._dtype)

    def _put_extra(self, key: Key, values: torch.Tensor | None, step: StepInput) -> None:
        """Masks and position ids cost nothing until the first step that has any; then the tokens before get theirs."""
        column = self._columns.get(key)
        if values is None and column is None:
            return
        dtype = torch.bool if key == "mask" else torch.int64
        if column is None:
            self._write(key, 0, self._default(0, step.position, dtype))
        if values is None:
            values = self._default(step.position, step.num_tokens, dtype)
        self._write(key, step.position, values)

    def _default(self, start: int, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """What no mask (all True), or no position ids (counting on), stand for."""
        if dtype == torch.bool:
            return torch.ones(self.batch_size, num_tokens, dtype=dtype)
        return torch.arange(start, start + num_tokens, dtype=dtype).expand(self.batch_size, -1)

    def _write(self, key: Key, position: int, values: torch.Tensor) -> None:
        end = position + values.shape[1]
        column = self._columns.get(key)
        kept = column.values if column is not None else values[:, :0]
        dtype = torch.promote_types(kept.dtype, values.dtype)  # a stand-in may compute in a wider one
        if kept.shape[1] < end or kept.dtype != dtype:
            kept = self._grown(kept, position, end, dtype)
        kept[:, position:end] = values
        self._columns[key] = Column(kept, end)

    def _grown(self, values: torch.Tensor, num_kept: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        doubled = max(FIRST_CAPACITY_TOKENS, 2 * values.shape[1])
        capacity = max(length, min(doubled, self._max_length))
        grown = values.new_empty((self.batch_size, capacity, *values.shape[2:]), dtype=dtype)
        grown[:, :num_kept] = values[:, :num_kept]
        return grown

    def _stay_within_bounds(self) -> None:
        """Lets go of the last boundaries, which the ones before them can bring back."""
        while self.size_bytes > self._max_bytes:
            kept = [key for key in self._columns if isinstance(key, int)]
            if len(kept) == 1:
                return
            del self._columns[max(kept)]
