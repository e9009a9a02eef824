"""Steps of one token a row, as a span takes them: prepared before their hidden states come, or together with others."""

from dataclasses import dataclass

import torch

from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.blocks.span_block import BlockCall
from p2pswarm.core.span import Span


@dataclass(frozen=True, slots=True, eq=False)
class PreparedStep:
    """What the blocks will be told of one more token, beside its hidden states. It holds the cache it is for."""

    cache: SpanCache
    blocks: Span
    position: int
    calls: tuple[BlockCall, ...]

    def is_for(self, cache: SpanCache | None, blocks: Span, position: int, num_tokens: int) -> bool:
        return cache is self.cache and (blocks, position, 1) == (self.blocks, self.position, num_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class BatchedStep:
    """One token more for each row of a session."""

    cache: SpanCache
    hidden_states: torch.Tensor
    """[rows, 1, hidden]"""
    position: int
