"""Which tokens of a session count, and which are padding."""

import torch


class Padding:
    """Of `batch_size` rows. Costs nothing until the first token that does not count."""

    def __init__(self, batch_size: int, max_length: int) -> None:
        self._batch_size = batch_size
        self._max_length = max_length
        self._counts: torch.Tensor | None = None
        """bool [batch, max_length]; None while all tokens count."""

    def extend(self, position: int, num_tokens: int, counts: torch.Tensor | None) -> None:
        """Notes the tokens from `position` on; `counts` is bool [batch, tokens], None if all of them count."""
        if self._counts is None:
            if counts is None:
                return
            self._counts = torch.ones(self._batch_size, self._max_length, dtype=torch.bool)
        self._counts[:, position : position + num_tokens] = True if counts is None else counts

    def reorder(self, beam_indices: torch.Tensor) -> None:
        if self._counts is not None:
            self._counts = self._counts[beam_indices]

    def mask(self, length: int) -> torch.Tensor | None:
        """bool [batch, length] for the first `length` tokens; None if all of them count."""
        return None if self._counts is None else self._counts[:, :length]
