"""How many rows may be on their way back through the blocks at a time, so that they keep to the memory they are given.

A row keeps what entered each block, and one block's notes of what its gradient needs: `swarmd/working_memory.py`
measures them. Pure: facts in, decision out. `swarmd/backward_pass.py` is what takes the memory.
"""

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass

from p2pswarm.core.byte_sizes import format_byte_size
from p2pswarm.core.errors import BadRequest
from p2pswarm.core.span import Span
from p2pswarm.wire.tuning import WireTuning
from swarmd.scheduling.costs import MAX_PART_TOKENS

DEFAULT_ROW_TOKENS = MAX_PART_TOKENS
"""Of the longest row that gradients are computed for where the operator does not say how much memory that may take:
as long as the longest part of a prompt."""
FLOAT_BYTES = 4


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
class BackwardMemory:
    """What gradients take."""

    fixed_bytes: int = 0
    """However short the rows."""
    moments: tuple[Growth, ...] = ()
    """In the block that is gone through: those at which rows of some length take most."""
    state_bytes: int = 0
    """What entered a block, of one token; kept for each block."""

    def row_bytes(self, num_tokens: int, num_blocks: int, added_token_bytes: int = 0) -> int:
        """One row through so many blocks. `added_token_bytes`: what a tuning keeps of each token, in one block."""
        in_block_bytes = max((moment.row_bytes(num_tokens) for moment in self.moments), default=0.0)
        return math.ceil(in_block_bytes) + num_tokens * (self.state_bytes * num_blocks + added_token_bytes)

    def default_bytes(self, num_blocks: int) -> int:
        """What to give them where the operator does not say."""
        return self.fixed_bytes + self.row_bytes(DEFAULT_ROW_TOKENS, num_blocks)


def most_rows(
    memory: BackwardMemory, limit_bytes: int, num_tokens: int, span: Span, tuning: WireTuning | None, max_length: int
) -> int:
    """How many rows of so many tokens may be under way. Raises `BadRequest` where not even one may."""
    added_bytes = 0 if tuning is None else tuned_token_bytes(tuning)
    left_bytes = limit_bytes - memory.fixed_bytes

    def row_bytes(length: int) -> int:
        return memory.row_bytes(length, span.num_blocks, added_bytes)

    if left_bytes >= row_bytes(num_tokens):
        return left_bytes // max(1, row_bytes(num_tokens))
    fitting = bisect_right(range(1, max_length + 1), left_bytes, key=row_bytes)
    raise BadRequest(
        f"gradients of a row of {num_tokens} tokens through blocks {span} take "
        f"{format_byte_size(memory.fixed_bytes + row_bytes(num_tokens))}, and this server has "
        f"{format_byte_size(limit_bytes)} for them (--training-memory): rows of up to {fitting} tokens fit"
    )


def tuned_token_bytes(tuning: WireTuning) -> int:
    """What low-rank pairs keep of one token, in the block where they keep most of it: what enters each of them and what
    is between its two matrices; and for the largest of them what goes in and out, twice, for a moment."""
    kept_bytes: Counter[int] = Counter()
    passing_bytes = 0
    for layer in tuning.layers:
        (rank, inputs), (outputs, _) = layer.down.shape, layer.up.shape
        kept_bytes[layer.block] += FLOAT_BYTES * (inputs + rank)
        passing_bytes = max(passing_bytes, 2 * FLOAT_BYTES * (inputs + rank + outputs))
    return max(kept_bytes.values(), default=0) + passing_bytes
