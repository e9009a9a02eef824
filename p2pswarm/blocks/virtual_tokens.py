"""A tuned prompt in front of a text: vectors that enter a decoder as if they were the embeddings of tokens.

The decoder and all blocks run them as the first tokens of each row, so that whatever it does to embeddings (scales,
norms, learned positions) is done to them too, as in peft's prompt tuning. Who calls the decoder sees nothing of them:
masks, positions and caches are those of the text alone, and what comes out is the text's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

PrefixSource = Callable[[], torch.Tensor | None]
"""Gives the vectors that the text of the call at hand has in front, [tokens, embedding size], or None."""


def no_prefix() -> torch.Tensor | None:
    """A text of its own tokens only."""
    return None


def with_prefix(
    prefix: torch.Tensor,
    inputs: Mapping[str, Any],
    position: int,
    embed: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """What the decoder is to be called with instead of `inputs`; `position` tokens of the text have passed before."""
    changed, length = dict(inputs), prefix.shape[0]
    mask, positions = changed.get("attention_mask"), changed.get("position_ids")
    if mask is not None and mask.ndim == 2:
        changed["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=1)
    if positions is not None:
        changed["position_ids"] = positions + length
    if position > 0:
        return changed
    if positions is not None:
        first = torch.arange(length, device=positions.device, dtype=positions.dtype)
        changed["position_ids"] = torch.cat([first.expand(*positions.shape[:-1], -1), positions + length], dim=-1)
    states = changed.get("inputs_embeds")
    if states is None:
        states = embed(changed["input_ids"])
    front = prefix.to(device=states.device, dtype=states.dtype).expand(states.shape[0], -1, -1)
    changed["input_ids"], changed["inputs_embeds"] = None, torch.cat([front, states], dim=1)
    return changed


def without_prefix(output: Any, length: int) -> Any:
    """What the decoder returned, without the first `length` tokens of the states in it."""
    if isinstance(output, tuple):
        return (output[0][:, length:], *output[1:])
    output["last_hidden_state"] = output["last_hidden_state"][:, length:]
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(states[:, length:] for states in output["hidden_states"])
    return output
