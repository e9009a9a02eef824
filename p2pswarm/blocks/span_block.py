"""A block in its place in a model's decoder, with the way in and the way out of a span.

The decoder calls its blocks as ever; what is going through just now, and which blocks it goes through, the blocks of a
span read off one `Passage` that `SpanModel` sets.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from p2pswarm.blocks.stand_ins import as_layer_output, copy_settings
from p2pswarm.core.span import Span

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with after its hidden states."""


@dataclass(slots=True)
class Passage:
    """What is going through the span just now."""

    blocks: Span
    hidden_states: torch.Tensor | None = None
    output: torch.Tensor | None = None
    calls: list[BlockCall] | None = None
    """None when the blocks are to run; otherwise they pass through, and note here what they were called with."""


class SpanBlock(nn.Module):
    """A real block in its place in the decoder, with the way in and the way out of the span."""

    def __init__(self, block: nn.Module, index: int, passage: Passage) -> None:
        super().__init__()
        copy_settings(block, self)
        self.block = block
        self.index = index
        self.passage = passage

    def forward(self, *arguments: Any, **named: Any) -> Any:
        passage = self.passage
        if not passage.blocks.covers(self.index):
            return as_layer_output(arguments[0] if arguments else named["hidden_states"])
        if passage.calls is not None:
            states = arguments[0] if arguments else named.pop("hidden_states")
            passage.calls.append((arguments[1:], named))
            return as_layer_output(states)
        if self.index == passage.blocks.start:
            if arguments:
                arguments = (passage.hidden_states, *arguments[1:])
            else:
                named["hidden_states"] = passage.hidden_states
        output = self.block(*arguments, **named)
        if self.index == passage.blocks.end - 1:
            passage.output = output[0] if isinstance(output, tuple) else output
        return output
