"""A model's head for many sessions of one process, each of which decodes in a thread of its own.

A head is a large matrix, and one token through it takes as long as reading it does. So whoever finds it busy waits, and
is then multiplied together with all others who wait: eight tokens through SmolLM2's head take 8 ms on one core of an
AMD EPYC (AVX2), one by one 40. A thread that comes alone takes its turn at once, and nobody is held for others.
"""

import threading

import torch
from torch import nn

from p2pswarm.blocks.column_kernel import MAX_ROWS, find_column_kernel
from p2pswarm.blocks.packed_weights import ColumnLinear


def share_head(head: nn.Module) -> None:
    """Lets threads that call the layer at once go through it together, where several rows cost less so."""
    if type(head) is ColumnLinear and find_column_kernel() is not None:
        head.__class__ = SharedHead
        assert isinstance(head, SharedHead)
        head.queue = _Queue()


class SharedHead(ColumnLinear):
    """A linear layer through which tokens of different threads go together."""

    queue: "_Queue"

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if states.numel() != self.in_features or states.requires_grad or self.weight.requires_grad:
            return super().forward(states)
        own = _Token(states)
        self.queue.waiting.append(own)
        with self.queue.turn:
            if own.output is None:
                self._multiply([own, *self.queue.take_others(own)])
        assert own.output is not None
        return own.output

    def _multiply(self, tokens: "list[_Token]") -> None:
        if len(tokens) == 1:
            tokens[0].output = super().forward(tokens[0].states)
            return
        rows = torch.cat([token.states.reshape(1, -1) for token in tokens])
        for token, output in zip(tokens, super().forward(rows), strict=True):
            token.output = output.view(*token.states.shape[:-1], -1)


class _Token:
    """What one thread wants multiplied."""

    __slots__ = ("output", "states")

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states
        self.output: torch.Tensor | None = None


class _Queue:
    """Those who wait for the head."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        """Held by whoever multiplies; only the holder takes tokens out."""
        self.waiting: list[_Token] = []

    def __reduce__(self) -> "tuple[type[_Queue], tuple[()]]":
        """A copy of the layer has a queue of its own."""
        return _Queue, ()

    def take_others(self, own: _Token) -> list[_Token]:
        """Those to be multiplied with it; all of these leave the queue. If that fails, each tries again by itself."""
        if own in self.waiting:
            self.waiting.remove(own)
        others = self.waiting[: MAX_ROWS - 1]
        del self.waiting[: len(others)]
        return others
