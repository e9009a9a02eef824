"""How many rows may be on their way back through the blocks at a time, and in how many of the blocks they leave notes,
so that they keep to the memory they are given and cost the least work.

A row keeps what entered each block, and the notes of what its gradient needs of one block at least: of each block more
that has room for them, it need not run once more. `swarmd/working_memory.py` measures both. Pure: facts in, decision
out. `swarmd/backward_pass.py` is what takes the memory, `p2pswarm/blocks/span_backward.py` how it does.
"""

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from p2pswarm.blocks.span_backward import num_stages
from p2pswarm.core.byte_sizes import format_byte_size
from p2pswarm.core.errors import BadRequest
from p2pswarm.core.span import Span
from p2pswarm.wire.tuning import WireTuning
from swarmd.scheduling.costs import MAX_PART_TOKENS

DEFAULT_ROW_TOKENS = MAX_PART_TOKENS
"""Of the longest row that gradients are computed for where the operator does not say how much memory that may take:
as long as the longest part of a prompt."""
FLOAT_BYTES = 4
TENSOR_SHARE = Fraction(7, 10)
"""Of the memory for gradients, for their tensors: these are made and freed in an order that leaves gaps between them in
malloc's heap. A process with ten blocks of SmolLM2 grew by 62 to 66 MiB where its tensors took 46, by 186 where they
took 138. With a mapping of its own for each tensor (`MALLOC_MMAP_THRESHOLD_`) it grew by what they took, and needed 40
percent more time. What is freed stays with the process for the next pass."""


@dataclass(frozen=True, slots=True)
class Growth:
    """What is there at one moment, by the length of a row."""

    token_bytes: float
    """Of each token."""
    square_bytes: float
    """Of each pair of tokens: masks, and attention where it is not computed by pieces."""

    def row_bytes(self, num_tokens: int) -> float:
        return num_tokens * (self.token_bytes + num_tokens * self.square_bytes)


@dataclass(frozen=True, slots=True)
class TunedBytes:
    """What a tuning adds for each token."""

    noted: int = 0
    """In each block that keeps notes."""
    passing: int = 0
    """For a moment, in one of them."""


@dataclass(frozen=True, slots=True)
class BackwardMemory:
    """What gradients take."""

    fixed_bytes: int = 0
    """However short the rows."""
    moments: tuple[Growth, ...] = ()
    """In the block that is gone through, its notes included: those at which rows of some length take most."""
    state_bytes: int = 0
    """What entered a block, of one token; kept for each block."""
    notes: Growth = Growth(0.0, 0.0)
    """Of each block more that keeps them."""
    fixed_notes_bytes: int = 0
    """Of each such block, however short the rows."""

    def rows_within(
        self, tensor_bytes: int, num_tokens: int, num_blocks: int, num_noted: int, tuned: TunedBytes = TunedBytes()
    ) -> int:
        """Of how many rows the tensors keep to the limit."""
        left_bytes = tensor_bytes - self.fixed_bytes - (num_noted - 1) * self.fixed_notes_bytes
        return max(0, left_bytes // max(1, self.row_bytes(num_tokens, num_blocks, num_noted, tuned)))

    def row_bytes(self, num_tokens: int, num_blocks: int, num_noted: int = 1, tuned: TunedBytes = TunedBytes()) -> int:
        """One row more through so many blocks, some of which keep notes."""
        in_block_bytes = max((moment.row_bytes(num_tokens) for moment in self.moments), default=0.0)
        noted_bytes = (num_noted - 1) * self.notes.row_bytes(num_tokens)
        token_bytes = self.state_bytes * num_blocks + tuned.noted * num_noted + tuned.passing
        return math.ceil(in_block_bytes + noted_bytes) + num_tokens * token_bytes

    def default_bytes(self, num_blocks: int) -> int:
        """What to give them where the operator does not say."""
        return with_gaps(self.fixed_bytes + self.row_bytes(DEFAULT_ROW_TOKENS, num_blocks))


def with_gaps(tensor_bytes: int) -> int:
    """What tensors of that size take of the memory for gradients."""
    return math.ceil(tensor_bytes / TENSOR_SHARE)


@dataclass(frozen=True, slots=True)
class TripSize:
    """Of the rows that go there and back together."""

    max_rows: int
    num_noted: int
    """Blocks that keep notes from the first time on."""


@dataclass(frozen=True, slots=True)
class AskedRows:
    """For which gradients are wanted."""

    num_rows: int
    num_tokens: int
    """Of each."""
    span: Span
    tuning: WireTuning | None


def trip_size(
    memory: BackwardMemory, limit_bytes: int, rows: AskedRows, *, max_length: int, pass_tokens: float
) -> TripSize:
    """The one that costs least. Raises `BadRequest` where there is no room for a single row.

    The more blocks keep notes, the fewer of them run once more; the fewer rows go together, the more often all weights
    are read, which each time costs as much as `pass_tokens` tokens do. Ten blocks of SmolLM2 on one thread, rows of 128
    tokens, processor time a token: all noted 2.4, 2.0 and 2.0 ms for one, two and eight rows at a time; one noted 3.3,
    2.8 and 2.8.
    """
    num_blocks, num_tokens = rows.span.num_blocks, rows.num_tokens
    tuned = TunedBytes() if rows.tuning is None else tuned_bytes(rows.tuning)
    tensor_bytes = int(limit_bytes * TENSOR_SHARE)

    def one_row_bytes(length: int) -> int:
        return memory.fixed_bytes + memory.row_bytes(length, num_blocks, tuned=tuned)

    if tensor_bytes < one_row_bytes(num_tokens):
        fitting = bisect_right(range(1, max_length + 1), tensor_bytes, key=one_row_bytes)
        raise BadRequest(
            f"gradients of a row of {num_tokens} tokens through blocks {rows.span} take "
            f"{format_byte_size(with_gaps(one_row_bytes(num_tokens)))}, and this server has "
            f"{format_byte_size(limit_bytes)} for them (--training-memory): rows of up to {fitting} tokens fit"
        )

    def cost(size: TripSize) -> float:
        num_trips = -(-rows.num_rows // size.max_rows)
        return num_stages(num_blocks, size.num_noted) * (num_trips * pass_tokens + rows.num_rows * num_tokens)

    sizes = []
    for num_noted in range(1, num_blocks + 1):
        max_rows = memory.rows_within(tensor_bytes, num_tokens, num_blocks, num_noted, tuned)
        if max_rows:
            sizes.append(TripSize(max_rows, num_noted))
    return min(sizes, key=cost)


def tuned_bytes(tuning: WireTuning) -> TunedBytes:
    """Of low-rank pairs. In the block where they note most: what enters each of them and what is between its two
    matrices; and for the largest of them what goes in and out, twice, for a moment."""
    noted: Counter[int] = Counter()
    passing = 0
    for layer in tuning.layers:
        (rank, inputs), (outputs, _) = layer.down.shape, layer.up.shape
        noted[layer.block] += FLOAT_BYTES * (inputs + rank)
        passing = max(passing, 2 * FLOAT_BYTES * (inputs + rank + outputs))
    return TunedBytes(max(noted.values(), default=0), passing)
