"""How long work takes on this device: learnt from what has run, so that sizes follow the machine and not a constant.

A pass through the span reads all weights, which takes `step_s` however little it computes; every further row of a
decode batch adds a little, every token of a longer part a little as well. Arithmetic only; times are handed in.
"""

from collections.abc import Mapping

from swarmd.scheduling.work import Kind

GAIN = 0.25
"""Of a new measurement: what was learnt ten passes ago counts for a twentieth."""
FIRST_PART_TOKENS = 64
"""Of a kind that was never measured: on the slowest machines half a second."""
MIN_PART_TOKENS = 16
"""Fewer cost almost as much: the weights are read in any case, and small matrices are multiplied slowly. Not so of a
backward pass: fewer tokens are some stages of more tokens."""
MAX_PART_TOKENS = 2048
"""What is computed besides keys and values grows with a part; this bounds it on the fastest machines."""
BACKWARD_COST = 1.15
"""Of a token in one block, on its way there with notes or back, in forward passes of it, until it is measured."""
FIRST_PASS_TOKENS = 16.0
"""`pass_tokens` until it is measured: that of SmolLM2 in float32 on one core of an EPYC."""
MIN_TOKEN_SHARE = 0.1
"""Of a part's time that its tokens take at the least, whatever a pass without them is said to take."""


class CostModel:
    """Learns; what is handed in is known from a measurement at the start."""

    def __init__(self, step_s: float | None = None, row_s: float = 0.0, token_s: float | None = None) -> None:
        self._step_s = step_s
        self._row_s = row_s
        self._token_s: dict[Kind, float] = {}
        if token_s is not None:
            self._token_s = dict.fromkeys(Kind, token_s) | {Kind.BACKWARD: BACKWARD_COST * token_s}

    @property
    def step_s(self) -> float:
        """A decode step of one row; 0 as long as nothing is known."""
        return self._step_s or 0.0

    @property
    def token_s(self) -> Mapping[Kind, float]:
        """Each token of a long part, by its kind."""
        return self._token_s

    @property
    def pass_tokens(self) -> float:
        """As many tokens take as long as it takes to read the weights for them."""
        token_s = self._token_s.get(Kind.FORWARD)
        return self._step_s / token_s if self._step_s and token_s else FIRST_PASS_TOKENS

    def decode_s(self, num_rows: int) -> float:
        """A batch of decode steps."""
        return self.step_s + self._row_s * (num_rows - 1)

    def rows_within(self, time_s: float) -> int:
        """The largest batch of decode steps that takes no longer; at least 1."""
        if self._row_s == 0.0:
            return MAX_PART_TOKENS
        return max(1, min(MAX_PART_TOKENS, 1 + int((time_s - self.step_s) / self._row_s)))

    def tokens_within(self, kind: Kind, time_s: float) -> int:
        """The largest part of that kind that takes no longer, or the smallest that makes sense."""
        token_s = self._token_s.get(kind)
        if token_s is None:
            return FIRST_PART_TOKENS
        left_s = time_s - self._fixed_s(kind)
        if token_s * MAX_PART_TOKENS <= left_s:
            return MAX_PART_TOKENS
        return max(1 if kind is Kind.BACKWARD else MIN_PART_TOKENS, int(left_s / token_s))

    def note_decode(self, num_rows: int, took_s: float) -> None:
        """Takes up what a batch of decode steps took: the error is shared by what caused it (normalized least mean
        squares, which is an exponential average where batches have one row)."""
        if self._step_s is None:
            self._step_s = took_s
            return
        error_s = GAIN * (took_s - self.decode_s(num_rows)) / (1 + (num_rows - 1) ** 2)
        self._step_s = max(0.0, self._step_s + error_s)
        self._row_s = max(0.0, self._row_s + error_s * (num_rows - 1))

    def note_part(self, kind: Kind, num_tokens: float, took_s: float) -> None:
        """Takes up what `num_tokens`, over all rows, of a prompt, a forward or a backward pass took."""
        token_s = max(took_s - self._fixed_s(kind), MIN_TOKEN_SHARE * took_s) / num_tokens
        known_s = self._token_s.get(kind)
        self._token_s[kind] = token_s if known_s is None else known_s + GAIN * (token_s - known_s)

    def _fixed_s(self, kind: Kind) -> float:
        """Of a part's time, for reading the weights. Where a part is of some blocks only, its tokens share it."""
        return 0.0 if kind is Kind.BACKWARD else self.step_s
