"""A model that is exact arithmetic: whoever loses, doubles or changes a token of a text gets other tokens after it.

Each stage turns a token's numbers into numbers that depend on every token that went into it before. Whole numbers
below 2^16 throughout, which float32 carries exactly. Knows nothing of networks; the servers of the simulation run
`StageState`, and `true_tokens` is what a client must end up with.
"""

import functools
from collections.abc import Sequence

import torch

from p2pswarm.core.span import Span
from simulations.churn.setting import HIDDEN_SIZE, STAGES

MODULUS = 65_521
"""The largest prime below 2^16."""
VOCABULARY_SIZE = 50_000
FIRST_TOKEN = 1
"""The prompt: a start token alone, so that all tokens of a text are decoded one by one."""

_CHANNELS = torch.arange(1, HIDDEN_SIZE + 1)


class StageState:
    """One text's past in one stage: what keys and values are to a real one."""

    def __init__(self, span: Span, max_length: int) -> None:
        self.length = 0
        """Tokens that have been run."""
        self._span = span
        self._totals = torch.zeros(max_length + 1, HIDDEN_SIZE, dtype=torch.int64)
        """After each number of tokens, the weighted sum of all of them."""

    def run(self, hidden_states: torch.Tensor, position: int) -> torch.Tensor:
        """`hidden_states` [1, tokens, hidden], tokens from `position` on; what was run from there is forgotten."""
        values = hidden_states[0].to(torch.int64)
        end = position + values.shape[0]
        weights = torch.arange(position + self._span.end, end + self._span.end)[:, None]
        totals = (self._totals[position] + (values * weights).cumsum(0)) % MODULUS
        self._totals[position + 1 : end + 1] = totals
        self.length = end
        return ((values * (self._span.start + 7) + totals) % MODULUS).to(torch.float32)[None]


def embedded(tokens: Sequence[int]) -> torch.Tensor:
    """What the client sends for these tokens; float32 [1, tokens, hidden]."""
    values = (torch.tensor(tokens)[:, None] * _CHANNELS + _CHANNELS**2) % MODULUS
    return values.to(torch.float32)[None]


def next_token(hidden_states: torch.Tensor) -> int:
    """The token that follows, by the last one's hidden states after the last stage."""
    return int((hidden_states[0, -1].to(torch.int64) * _CHANNELS).sum()) % VOCABULARY_SIZE


@functools.cache
def true_tokens(num_tokens: int) -> tuple[int, ...]:
    """The text that follows the first token."""
    states = [StageState(span, num_tokens) for span in STAGES]
    tokens = [FIRST_TOKEN]
    for position in range(num_tokens):
        hidden_states = embedded(tokens[-1:])
        for state in states:
            hidden_states = state.run(hidden_states, position)
        tokens.append(next_token(hidden_states))
    return tuple(tokens[1:])
