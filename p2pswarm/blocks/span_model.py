"""A span of a model's blocks, as a server runs it: hidden states in, hidden states out.

The model's own base class runs, with its own masks and rotary embeddings, around a layer list in which only the
span's layers are real. What it does before its layers goes nowhere: at the span's first layer the true hidden states
are swapped in, and at the last one the answer is taken out. Read `architecture.py` for how the parts are found and
`stand_ins.py` for what fills the rest.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from p2pswarm.blocks.architecture import Layout, lay_out, layer_windows
from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.blocks.loading import load_weights
from p2pswarm.blocks.stand_ins import PassThrough, empty_outside
from p2pswarm.blocks.weight_source import WeightSource
from p2pswarm.core.errors import ConfigError, UnsupportedModelError
from p2pswarm.core.span import Span


class SpanModel:
    """Blocks `span` of a model. Owned by one thread; holds no state of any session."""

    def __init__(self, layout: Layout, span: Span, *, dtype: torch.dtype, device: torch.device) -> None:
        self.span = span
        self.hidden_size = layout.hidden_size
        self.dtype = dtype
        self.device = device
        self._base_model = layout.base_model
        self._windows = layer_windows(layout.model.config)
        self._accepted = frozenset(inspect.signature(type(self._base_model).forward).parameters)
        self._swapped_in: torch.Tensor | None = None
        self._taken_out: torch.Tensor | None = None
        self._blocks = layout.blocks
        self._indices = range(span.start, span.end)
        self._blocks[span.start].register_forward_pre_hook(self._swap_in, with_kwargs=True)
        self._blocks[span.end - 1].register_forward_hook(self._take_out)
        self.cache_bytes_per_token = self._measure_cache()
        """Keys and values of one token of one sequence, over the whole span."""

    def new_cache(self, batch_size: int, blocks: Span | None = None) -> SpanCache:
        """An empty cache of `blocks` (all of the span's) for `batch_size` sequences; takes its memory as tokens come."""
        return SpanCache(blocks or self.span, self._windows)

    @torch.inference_mode()
    def run(
        self,
        hidden_states: torch.Tensor,
        cache: SpanCache | None,
        *,
        position: int,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        blocks: Span | None = None,
    ) -> torch.Tensor:
        """The hidden states after the last of `blocks` (all of the span's), shaped as those that came in.

        `hidden_states: [batch, tokens, hidden]` follow the first `position` tokens in the cache; whatever the cache
        holds after them is forgotten first. `attention_mask: [batch, position + tokens], bool`, False where there is
        padding. `position_ids: [batch, tokens], int64`; None counts on from `position`. On an exception the cache
        holds the first `position` tokens. Without a cache, `position` must be 0.
        """
        if cache is not None:
            cache.crop(position)
        elif position != 0:
            raise ValueError(f"a run at position {position} needs a cache")
        states = hidden_states.to(device=self.device, dtype=self.dtype)
        try:
            with self._only(blocks or self.span):
                return self._run(states, cache, attention_mask=attention_mask, position_ids=position_ids)
        except BaseException:
            if cache is not None:
                cache.crop(position)
            raise
        finally:
            self._swapped_in = self._taken_out = None

    def _run(self, states: torch.Tensor, cache: SpanCache | None, **optional: torch.Tensor | None) -> torch.Tensor:
        arguments: dict[str, Any] = {
            name: value.to(self.device)
            for name, value in optional.items()
            if value is not None and name in self._accepted
        }
        self._swapped_in = states
        self._base_model(inputs_embeds=states, past_key_values=cache, use_cache=cache is not None, **arguments)
        assert self._taken_out is not None
        return self._taken_out

    @contextmanager
    def _only(self, wanted: Span) -> Iterator[None]:
        """Lets the span's other blocks pass their hidden states on, while the context lasts."""
        if wanted == self.span:
            yield
            return
        if not self.span.contains(wanted):
            raise ValueError(f"blocks {wanted} are not in the span {self.span}")
        others = {index: self._blocks[index] for index in self._indices if not wanted.covers(index)}
        for index, block in others.items():
            self._blocks[index] = PassThrough(block)
        hooks = (
            self._blocks[wanted.start].register_forward_pre_hook(self._swap_in, with_kwargs=True),
            self._blocks[wanted.end - 1].register_forward_hook(self._take_out),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for index, block in others.items():
                self._blocks[index] = block

    def _swap_in(
        self, layer: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if arguments:
            return (self._swapped_in, *arguments[1:]), dict(named)
        return arguments, {**named, "hidden_states": self._swapped_in}

    def _take_out(self, layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._taken_out = output[0] if isinstance(output, tuple) else output

    def _measure_cache(self) -> int:
        """Runs one token, and so shows that the span works and that each of its layers keeps keys and values of it."""
        cache = self.new_cache(1)
        self.run(torch.zeros(1, 1, self.hidden_size), cache, position=0)
        forgetful = [self.span.start + index for index, layer in enumerate(cache.held) if layer.length != 1]
        if forgetful:
            raise UnsupportedModelError(
                f"the blocks {', '.join(map(str, forgetful))} keep no keys and values of their own, "
                "so they cannot be served apart from others"
            )
        return sum(layer.size_bytes // layer.capacity for layer in cache.held)


def load_span(
    source: WeightSource,
    span: Span,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> SpanModel:
    """The span of the checkpoint's model, with only its own tensors read.

    Raises `UnsupportedModelError`, `CheckpointError`, or `ConfigError` when the model has no such blocks.
    """
    device = torch.device(device)
    layout = lay_out(source.config, dtype)
    if span.end > layout.num_blocks:
        raise ConfigError(f"{source.name} has the blocks 0:{layout.num_blocks}, so not {span}")
    for index, layer in enumerate(layout.blocks):
        if not span.covers(index):
            layout.blocks[index] = PassThrough(layer)
    empty_outside(layout.model, layout.blocks_path)
    load_weights(layout.model, source, dtype=dtype, device=device)
    return SpanModel(layout, span, dtype=dtype, device=device)
