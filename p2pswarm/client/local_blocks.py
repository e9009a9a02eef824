"""The first and last blocks of a model, kept by the client itself, so that servers see only what lies between them.

Near its two ends a model's hidden states are close to its text (`docs/security.md` says how close). Whoever keeps the
ends pays for them with memory and time of his own; what comes out is the same.

The blocks are those that a server would run (`blocks/span_model.py`), and run in threads, one run at a time. Knows
nothing of servers. `local_session.py` runs the steps of sessions, `local_calls.py` batches and their gradients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import trio

from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class LocalPart:
    """Some of the blocks that are run here."""

    span: Span
    model: SpanModel
    """Holds them, and maybe others."""
    turns: trio.CapacityLimiter

    async def run(self, function: Callable[[], Result]) -> Result:
        """What the function, which uses the model, returns in a thread; others wait for their turn.

        Cancelled, it waits for the function to return all the same.
        """
        return await trio.to_thread.run_sync(function, limiter=self.turns)


class LocalBlocks:
    """Made by `load_local_blocks`; shared by all sessions and passes of a model."""

    def __init__(self, first: SpanModel, last: SpanModel) -> None:
        turns = trio.CapacityLimiter(1)
        self.first = LocalPart(first.span, first, turns)
        self.last = LocalPart(last.span, last, turns)

    @property
    def remote(self) -> Span:
        """The blocks in between, which servers run."""
        return Span(self.first.span.end, self.last.span.start)

    def parts(self, blocks: Span) -> Iterator[LocalPart | Span]:
        """`blocks` in order, cut where they change hands; a bare span is for servers."""
        for place in (self.first, self.remote, self.last):
            span = place if isinstance(place, Span) else place.span
            if span.overlaps(blocks):
                common = Span(max(span.start, blocks.start), min(span.end, blocks.end))
                yield common if isinstance(place, Span) else replace(place, span=common)


def load_local_blocks(checkpoint: Checkpoint, num_blocks: int, dtype: torch.dtype) -> LocalBlocks:
    """The model's first `num_blocks` and its last `num_blocks`, with only their own tensors read. Blocking.

    Raises `ConfigError` where that would leave nothing to servers, and what `load_span` does.
    """
    total = checkpoint.num_blocks
    if not 1 <= num_blocks <= (total - 1) // 2:
        raise ConfigError(
            f"local_blocks {num_blocks} are kept of each end of a model, and leave nothing of the {total} blocks of "
            f"{checkpoint.name} to servers: at most {(total - 1) // 2}"
        )
    first, last = Span(0, num_blocks), Span(total - num_blocks, total)
    return LocalBlocks(load_span(checkpoint, first, dtype=dtype), load_span(checkpoint, last, dtype=dtype))


def check_adapter(local: LocalBlocks | None, adapter_id: str | None) -> None:
    """Raises `ConfigError` for an adapter that only servers have, where some blocks are not theirs."""
    if local is not None and adapter_id is not None:
        raise ConfigError(
            f"servers have the adapter {adapter_id}, and the blocks {local.first.span} and {local.last.span}, which "
            "are kept here (local_blocks), do not: give a folder that holds it, which goes along to all blocks"
        )
