"""The tokens of a session, so that `generate` can go on from where it stopped. Plain tensors, no network."""

from dataclasses import dataclass

import torch

from p2pswarm.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """Tokens that a session has seen or given out, and which of them are padding."""

    token_ids: torch.Tensor
    """int64 [rows, tokens]"""
    attention_mask: torch.Tensor
    """int64 [rows, tokens]: 0 for padding."""

    @property
    def length(self) -> int:
        return self.token_ids.shape[1]

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[0]

    def cropped(self, length: int) -> "TokenHistory":
        """The first `length` tokens."""
        return TokenHistory(self.token_ids[:, :length], self.attention_mask[:, :length])

    def followed_by(self, token_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> "TokenHistory":
        """With more tokens at the end of each row."""
        if token_ids.shape[0] != self.num_rows:
            raise ConfigError(
                f"the session holds {self.num_rows} sequences, the new tokens are for {token_ids.shape[0]}; "
                "set session.position = 0 to start over, or open another session"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(token_ids)
        return TokenHistory(
            torch.cat([self.token_ids, token_ids], dim=1),
            torch.cat([self.attention_mask, attention_mask.to(self.attention_mask.dtype)], dim=1),
        )

    @classmethod
    def starting_with(cls, token_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> "TokenHistory":
        mask = torch.ones_like(token_ids) if attention_mask is None else attention_mask.to(token_ids.dtype)
        if mask.shape != token_ids.shape:
            raise ConfigError(
                f"attention_mask has shape {list(mask.shape)}, the tokens it is for {list(token_ids.shape)}"
            )
        return cls(token_ids, mask)
