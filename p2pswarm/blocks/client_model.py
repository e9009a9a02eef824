"""A model as a client runs it: embeddings, final norm and head here, all blocks somewhere else.

It is the model's own class, causal language model or another, so `forward` and `generate` are transformers'. Its first
block calls `run_blocks`, its others pass through; both hold no weights. `SwarmCache` is what the model takes for its
key-value cache. `virtual_tokens.py` puts tuned prompts in front of texts.
"""

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from p2pswarm.blocks.architecture import Head, lay_out
from p2pswarm.blocks.loading import LOADING, load_weights
from p2pswarm.blocks.packed_weights import pack_layer
from p2pswarm.blocks.shared_head import share_head
from p2pswarm.blocks.stand_ins import BlockList, PassThrough, as_layer_output, copy_settings
from p2pswarm.blocks.virtual_tokens import PrefixSource, no_prefix, with_prefix, without_prefix
from p2pswarm.blocks.weight_source import WeightSource
from p2pswarm.core.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEAD_DEVIATION = 0.02
"""Of the weights of a new head, where the config does not say; nearly all configs say this."""


class SwarmCache(Cache):
    """Stands for keys and values that the servers hold: it knows how many tokens have passed, and what is to be undone.

    Given to `generate` or `forward` as `past_key_values`. Setting `position` back forgets tokens. A tuned prompt in
    front of the text is not counted, but while the decoder runs.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.position = 0
        """Tokens that have passed."""
        self.beam_indices: torch.Tensor | None = None
        """What `reorder_cache` asked for since the last step: `[batch], int64`."""
        self.prefix_length = 0
        """Tokens that passed before the text; told to the decoder only."""

    def __bool__(self) -> bool:
        return True  # although it has no layers, and so a length of 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position + self.prefix_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

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


@dataclass(frozen=True, slots=True, eq=False)
class _DecoderCall:
    """What the decoder was called with."""

    inputs: Mapping[str, Any]
    cache: SwarmCache | None
    num_virtual_tokens: int
    """At the front of these inputs."""


class SwarmBlocks(nn.Module):
    """The first block of a client's model: it stands for all of them."""

    def __init__(self, replaced: nn.Module, run_blocks: RunBlocks, embeddings: Callable[[], nn.Module]) -> None:
        """`embeddings` gives the model's own."""
        super().__init__()
        copy_settings(replaced, self)
        self.run_blocks = run_blocks
        self.prefix: PrefixSource = no_prefix
        """Asked at each call for the tuned prompt in front of its text."""
        self._embeddings = embeddings
        self._calls = threading.local()
        """`current`: that of each thread that generates."""

    def before_decoder(
        self, decoder: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A forward pre-hook of the decoder, the module that runs the blocks."""
        bound = inspect.signature(decoder.forward).bind_partial(*arguments).arguments if arguments else {}
        inputs: Mapping[str, Any] = {**bound, **named}
        cache = inputs.get("past_key_values")
        if cache is not None and not isinstance(cache, SwarmCache):
            raise TypeError(f"past_key_values must be a SwarmCache (or None), not {type(cache).__name__}")
        prefix = self.prefix()
        if prefix is None:
            self._calls.current = _DecoderCall(inputs, cache, 0)
            return None
        position = cache.position if cache is not None else 0
        inputs = with_prefix(prefix, inputs, position, self._embeddings())
        self._calls.current = _DecoderCall(inputs, cache, 0 if position else prefix.shape[0])
        if cache is not None and position:
            cache.prefix_length = prefix.shape[0]
        return (), dict(inputs)

    def after_decoder(
        self, decoder: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Any
    ) -> Any:
        """A forward hook of the decoder, called even where it has failed."""
        call: _DecoderCall | None = self._calls.__dict__.pop("current", None)
        if call is None:
            return output
        if call.cache is not None:
            call.cache.prefix_length = 0
        if output is None or not call.num_virtual_tokens:
            return output
        return without_prefix(output, call.num_virtual_tokens)

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **named_arguments: Any) -> torch.Tensor:
        decoder_call: _DecoderCall = self._calls.current
        inputs, cache = decoder_call.inputs, decoder_call.cache
        position = cache.get_seq_length() if cache is not None else 0
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
            cache.position += num_tokens - decoder_call.num_virtual_tokens
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
    head: Head = Head.CAUSAL_LM,
    num_labels: int | None = None,
    seed: int = 0,
) -> "PreTrainedModel":
    """The checkpoint's model with that head, without its blocks, of which no tensor is read.

    A sequence classifier has `num_labels` labels, by default those of the checkpoint's config. Where its head is not in
    the checkpoint, it is drawn with the seed, in float32. Raises `UnsupportedModelError` or `CheckpointError`; what
    `run_blocks` raises comes out of `forward`.
    """
    device = torch.device(device)
    with LOADING:
        layout = lay_out(_with_labels(source.config, num_labels), dtype, head)
        model, blocks = layout.model, layout.blocks
        first = SwarmBlocks(blocks[0], run_blocks, model.get_input_embeddings)
        layout.decoder.register_forward_pre_hook(first.before_decoder, with_kwargs=True)
        layout.decoder.register_forward_hook(first.after_decoder, with_kwargs=True, always_call=True)
        for index, layer in enumerate(blocks):
            blocks[index] = PassThrough(layer) if index else first
        model.set_submodule(layout.blocks_path, BlockList(blocks))
        with _heads_filled(model, source, device, seed):
            load_weights(model, source, dtype=dtype, device=device)
        _check_blocks_see_no_tokens(layout.decoder, first, device)
        # One token through SmolLM2's head: 5.7 ms instead of 9.2. With it go tied embeddings: 8 us instead of 5.
        output_embeddings = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if output_embeddings is not None:
            pack_layer(output_embeddings)
            share_head(output_embeddings)
        if head is Head.CAUSAL_LM:
            if source.generation_config is not None:
                model.generation_config = source.generation_config
            # Some configs say False, and would send the whole text each time.
            model.generation_config.use_cache = True
        return model


def blocks_of(model: "PreTrainedModel") -> SwarmBlocks:
    """The module that stands for the blocks in what `load_client_model` gave."""
    return next(module for module in model.modules() if isinstance(module, SwarmBlocks))


def head_names(model: "PreTrainedModel") -> list[str]:
    """The model's modules that follow its base model and are not there for generating: `["score"]` of a classifier."""
    if model.can_generate() or not hasattr(model, model.base_model_prefix):
        return []
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _with_labels(config: "PretrainedConfig", num_labels: int | None) -> "PretrainedConfig":
    if num_labels is None:
        return config
    changed = copy.deepcopy(config)
    changed.get_text_config(decoder=True).num_labels = num_labels
    return changed


@contextmanager
def _heads_filled(model: "PreTrainedModel", source: WeightSource, device: torch.device, seed: int) -> Iterator[None]:
    """Keeps heads that the checkpoint does not have out of the model while it is loaded, and then puts them in as
    transformers draws them. In the end all heads are in float32, and take what they are given into it.
    """
    names = head_names(model)
    absent = {
        name: model.get_submodule(name)
        for name in names
        if not any(key.startswith(f"{name}.") for key in source.tensor_names)
    }
    for name in absent:
        model.set_submodule(name, nn.Identity())
    yield
    generator = torch.Generator().manual_seed(seed)
    for name, head in absent.items():
        _draw(head.to_empty(device="cpu"), getattr(model.config, "initializer_range", HEAD_DEVIATION), generator)
        model.set_submodule(name, head.to(device).requires_grad_(False))
    for name in names:
        model.get_submodule(name).float().register_forward_pre_hook(_in_float32)


@torch.no_grad()
def _draw(head: nn.Module, deviation: float, generator: torch.Generator) -> None:
    for parameter in head.parameters():
        if parameter.ndim == 1:
            parameter.zero_()
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)


def _in_float32(head: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(states.float() for states in arguments)
