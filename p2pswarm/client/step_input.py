"""What a session is given to run: the hidden states of new tokens, and what belongs to them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from p2pswarm.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepInput:
    """New tokens for a session, before its first block."""

    hidden_states: torch.Tensor
    """[batch, tokens, hidden], any float."""
    position: int
    """Tokens kept from before; fewer than were run means going back."""
    attention_mask: torch.Tensor | None = None
    """bool [batch, tokens]: False for padding. None: no padding."""
    position_ids: torch.Tensor | None = None
    """int64 [batch, tokens]. None: position, position + 1, ..."""
    beam_indices: torch.Tensor | None = None
    """int64 [batch]: the row that each row goes on from."""

    def check(self) -> None:
        """Raises `ConfigError` where the parts do not fit one another."""
        if self.hidden_states.ndim != 3:
            raise ConfigError(f"hidden states are [batch, tokens, hidden], got {list(self.hidden_states.shape)}")
        extras = {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        for name, tensor in extras.items():
            if tensor is not None and tensor.shape != self.hidden_states.shape[:2]:
                raise ConfigError(f"{name} is {list(self.hidden_states.shape[:2])} here, got {list(tensor.shape)}")
        beams = self.beam_indices
        if beams is not None and (beams.shape != (self.batch_size,) or not ((beams >= 0) & (beams < len(beams))).all()):
            raise ConfigError(f"beam_indices are a row below {self.batch_size} for each row, got {beams.tolist()}")

    @property
    def batch_size(self) -> int:
        return self.hidden_states.shape[0]

    @property
    def num_tokens(self) -> int:
        """Of each sequence."""
        return self.hidden_states.shape[1]

    @property
    def num_tokens_in_total(self) -> int:
        return self.batch_size * self.num_tokens

    @property
    def end(self) -> int:
        """The position after the step."""
        return self.position + self.num_tokens


def in_parts(step: StepInput, max_bytes: int) -> Iterator[StepInput]:
    """The step as several, one after the other, each with hidden states of at most `max_bytes` (or of one token)."""
    bytes_per_token = step.batch_size * step.hidden_states.shape[2] * step.hidden_states.dtype.itemsize
    tokens_at_once = max(1, max_bytes // bytes_per_token)
    if step.num_tokens <= tokens_at_once:
        yield step
        return
    for start in range(0, step.num_tokens, tokens_at_once):
        part = slice(start, start + tokens_at_once)
        yield StepInput(
            step.hidden_states[:, part],
            step.position + start,
            None if step.attention_mask is None else step.attention_mask[:, part],
            None if step.position_ids is None else step.position_ids[:, part],
            step.beam_indices if start == 0 else None,
        )


def in_rows(step: StepInput, max_tokens: int, max_bytes: int) -> list[StepInput]:
    """The step as several of some of its rows each, as many as can be alike: of at most `max_tokens`, and
    `max_bytes` as float32 (or of one row)."""
    bytes_per_row = step.num_tokens * step.hidden_states.shape[2] * torch.float32.itemsize
    rows_at_once = min(max_tokens // max(1, step.num_tokens), max_bytes // max(1, bytes_per_row))
    num_parts = -(-step.batch_size // max(1, rows_at_once))
    states = step.hidden_states.tensor_split(num_parts)
    masks, position_ids = (
        [None] * num_parts if tensor is None else tensor.tensor_split(num_parts)
        for tensor in (step.attention_mask, step.position_ids)
    )
    return [
        StepInput(some_states, step.position, mask, ids)
        for some_states, mask, ids in zip(states, masks, position_ids, strict=True)
    ]
