"""A model as a client runs it: embeddings, final norm and head here, all blocks somewhere else.

It is the model's own causal language model class, so `forward` and `generate` are transformers'. Its first block
calls `run_blocks`, its others pass through; both hold no weights. `SwarmCache` is what the model takes for its
key-value cache.
"""

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from p2pswarm.blocks.architecture import lay_out
from p2pswarm.blocks.loading import LOADING, load_weights
from p2pswarm.blocks.packed_weights import pack_layer
from p2pswarm.blocks.shared_head import share_head
from p2pswarm.blocks.stand_ins import BlockList, PassThrough, as_layer_output, copy_settings
from p2pswarm.blocks.weight_source import WeightSource
from p2pswarm.core.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SwarmCache(Cache):
    """Stands for keys and values that the servers hold: it knows how many tokens have passed, and what is to be undone.

    Given to `generate` or `forward` as `past_key_values`. Setting `position` back forgets tokens.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.position = 0
        """Tokens that have passed."""
        self.beam_indices: torch.Tensor | None = None
        """What `reorder_cache` asked for since the last step: `[batch], int64`."""

    def __bool__(self) -> bool:
        return True  # although it has no layers, and so a length of 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.position + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; `tokens_to_remove` is negative, as in transformers."""
        if not -self.position <= tokens_to_remove <= 0:
            raise ValueError(f"cannot remove {-tokens_to_remove} of {self.position} tokens")
        self.position += tokens_to_remove

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes row i what row `beam_idx[i]` was, before the next step."""
        self.beam_indices = beam_idx if self.beam_indices is None else self.beam_indices[beam_idx]

    def reset(self) -> None:
        self.position = 0
        self.beam_indices = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse_other_batch()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._refuse_other_batch()

    def _refuse_other_batch(self) -> None:
        if self.position:
            raise NotImplementedError("the batch size of a session is fixed when its first token passes")


@dataclass(frozen=True, slots=True, eq=False)
class BlocksCall:
    """One passage of new tokens through all blocks."""

    hidden_states: torch.Tensor
    """[batch, tokens, hidden]"""
    position: int
    """Tokens that have passed before these; what servers hold beyond them is to be forgotten."""
    attention_mask: torch.Tensor | None
    """[batch, position + tokens], bool, False where there is padding; None: no padding."""
    position_ids: torch.Tensor | None
    """[batch, tokens], int64; None: they count on from `position`."""
    beam_indices: torch.Tensor | None
    """[batch], int64: rows of the servers' caches to be reordered first."""
    cache: SwarmCache | None
    """Whose passage it is; None: nothing is to be remembered."""


RunBlocks = Callable[[BlocksCall], torch.Tensor]
"""Returns the hidden states after the last block, [batch, tokens, hidden]."""


class SwarmBlocks(nn.Module):
    """The first block of a client's model: it stands for all of them."""

    def __init__(self, replaced: nn.Module, run_blocks: RunBlocks) -> None:
        super().__init__()
        copy_settings(replaced, self)
        self.run_blocks = run_blocks
        self._called_with = threading.local()
        """`inputs`: what the decoder was called with, in each thread that generates."""

    def remember_inputs(self, decoder: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """A forward pre-hook of the decoder, the module that runs the blocks."""
        bound = inspect.signature(decoder.forward).bind_partial(*arguments).arguments if arguments else {}
        self._called_with.inputs = {**bound, **named}

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **named_arguments: Any) -> torch.Tensor:
        inputs: Mapping[str, Any] = self._called_with.__dict__.pop("inputs")
        cache = inputs.get("past_key_values")
        if cache is not None and not isinstance(cache, SwarmCache):
            raise TypeError(f"past_key_values must be a SwarmCache (or None), not {type(cache).__name__}")
        position = cache.position if cache is not None else 0
        num_tokens = hidden_states.shape[1]
        call = BlocksCall(
            hidden_states=hidden_states,
            position=position,
            attention_mask=_padding(inputs.get("attention_mask"), position + num_tokens),
            position_ids=_unusual_positions(inputs.get("position_ids"), position, num_tokens),
            beam_indices=cache.beam_indices if cache is not None else None,
            cache=cache,
        )
        output = self.run_blocks(call)
        if cache is not None:
            cache.position = position + num_tokens
            cache.beam_indices = None
        return as_layer_output(output.to(device=hidden_states.device, dtype=hidden_states.dtype))


def _padding(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The mask where it hides anything."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(f"attention_mask must be [batch, tokens], got the shape {list(mask.shape)}")
    if mask.shape[1] != length:
        raise ValueError(f"attention_mask covers {mask.shape[1]} tokens, but {length} have come")
    mask = mask.to(torch.bool)
    return None if bool(mask.all()) else mask


def _unusual_positions(position_ids: torch.Tensor | None, position: int, num_tokens: int) -> torch.Tensor | None:
    """The position ids where they do not just count on."""
    if position_ids is None:
        return None
    usual = torch.arange(position, position + num_tokens, device=position_ids.device)
    return None if bool((position_ids == usual).all()) else position_ids


@torch.inference_mode()
def _check_blocks_see_no_tokens(decoder: nn.Module, blocks: SwarmBlocks, device: torch.device) -> None:
    """Raises `UnsupportedModelError` when blocks are told more of the tokens than their hidden states.

    Whatever else they are told (masks, rotary embeddings), a server works out by itself, without the tokens.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = () if arguments else ("hidden_states",)
        calls.append((arguments[1:], {name: value for name, value in named.items() if name not in states}))

    run_blocks, blocks.run_blocks = blocks.run_blocks, lambda call: call.hidden_states
    hook = blocks.register_forward_pre_hook(record, with_kwargs=True)
    try:
        for token in (0, 1):
            decoder(input_ids=torch.full((1, 2), token, device=device), use_cache=False)
    finally:
        hook.remove()
        blocks.run_blocks = run_blocks
    if not _same(*calls):
        raise UnsupportedModelError(
            f"the blocks of a {type(decoder).__name__} are told more of each token than its hidden state, "
            "which a server cannot know"
        )


def _same(one: Any, other: Any) -> bool:
    """Whether two nested structures of tensors are equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return True


def load_client_model(
    source: WeightSource,
    run_blocks: RunBlocks,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> "PreTrainedModel":
    """The checkpoint's causal language model without its blocks, of which no tensor is read.

    Raises `UnsupportedModelError` or `CheckpointError`; what `run_blocks` raises comes out of `forward`.
    """
    device = torch.device(device)
    with LOADING:
        layout = lay_out(source.config, dtype)
        blocks = layout.blocks
        first = SwarmBlocks(blocks[0], run_blocks)
        layout.decoder.register_forward_pre_hook(first.remember_inputs, with_kwargs=True)
        for index, layer in enumerate(blocks):
            blocks[index] = PassThrough(layer) if index else first
        layout.model.set_submodule(layout.blocks_path, BlockList(blocks))
        load_weights(layout.model, source, dtype=dtype, device=device)
        _check_blocks_see_no_tokens(layout.decoder, first, device)
        # One token through SmolLM2's head: 5.7 ms instead of 9.2. With it go tied embeddings: 8 us instead of 5.
        head = layout.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        pack_layer(head)
        share_head(head)
        if source.generation_config is not None:
            layout.model.generation_config = source.generation_config
        # Some configs say False, and would send the whole text each time.
        layout.model.generation_config.use_cache = True
        return layout.model
