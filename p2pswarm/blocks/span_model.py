"""A span of a model's blocks, as a server runs it: hidden states in, hidden states out.

The model's own decoder class runs, with its own masks and rotary embeddings, around a block list in which only the
span's blocks are real. What it does before its blocks goes nowhere: at the first block the true hidden states are
swapped in, and at the last one the answer is taken out. All that takes 1 ms a token, 2 to 3 after a pause, and does not
depend on the hidden states: `SpanModel.prepare` does it before they come. Read `architecture.py` for how the parts are
found, `stand_ins.py` for what fills the rest, and `span_backward.py` for how gradients come back.
"""

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache

from p2pswarm.blocks.adapted_layers import adapt_layers
from p2pswarm.blocks.adapters import Adapter, LoadedAdapter
from p2pswarm.blocks.architecture import Layout, lay_out, layer_kinds, layer_windows
from p2pswarm.blocks.batch_attention import Rows, RowsCache, attention_by_rows
from p2pswarm.blocks.kv_cache import SpanCache, own_pool_pages
from p2pswarm.blocks.kv_pool import KVPool, LayerShape
from p2pswarm.blocks.lean_modules import make_lean
from p2pswarm.blocks.loading import LOADING, load_weights
from p2pswarm.blocks.packed_weights import pack_weights
from p2pswarm.blocks.quantization import check_quantizable, load_quantized, rounding_of
from p2pswarm.blocks.span_backward import Gradients, RoundTrip, Way, run_blocks
from p2pswarm.blocks.span_block import BlockCall, Passage, SpanBlock
from p2pswarm.blocks.span_steps import BatchedStep, PreparedStep
from p2pswarm.blocks.span_trials import batches_exactly, kept_layers, prepares_exactly
from p2pswarm.blocks.stand_ins import BlockList, PassThrough, empty_outside
from p2pswarm.blocks.tuned_layers import TunedLayers
from p2pswarm.blocks.tuning import SpanTuning, fit_tuning
from p2pswarm.blocks.weight_source import WeightSource
from p2pswarm.core.errors import ConfigError, UnsupportedModelError
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span


class SpanModel:
    """Blocks `span` of a model. Owned by one thread; holds no state of any session."""

    def __init__(
        self,
        layout: Layout,
        span: Span,
        *,
        dtype: torch.dtype,
        device: torch.device,
        adapters: Sequence[LoadedAdapter] = (),
    ) -> None:
        """Takes the layout's blocks over; they and all around them must hold their weights."""
        self.span = span
        self.hidden_size = layout.hidden_size
        self.dtype = dtype
        self.device = device
        self._decoder = layout.decoder
        self._accepted = frozenset(inspect.signature(type(self._decoder).forward).parameters)
        self._config = layout.model.config
        self._windows = layer_windows(self._config)
        self._passage = Passage(span)
        self._layer_shapes: dict[int, LayerShape] = {}
        self._blocks = {index: layout.blocks[index] for index in range(span.start, span.end)}
        for index, block in self._blocks.items():
            layout.blocks[index] = SpanBlock(block, index, self._passage)
        self.cache_bytes_per_token = 0
        """Keys and values of one token of one sequence, over the whole span."""
        pack_weights(self._decoder, self._try_out)
        self._active_adapter = adapt_layers(self._blocks, adapters)
        make_lean(self._decoder)
        self._tuned_layers = TunedLayers(self._blocks)
        self.can_train = True  # until it is tried
        self.can_train = prepares_exactly(self)
        """Whether `run_backward` works, and prompts can be added at each block."""
        # What a chunked layer sees is not the last so many tokens, which a trial so short would not show.
        has_chunks = "chunked_attention" in layer_kinds(self._config)
        self.can_batch = not has_chunks and batches_exactly(self, rounding_of(self._decoder, dtype))
        """Whether `run_batch` gives what `run` gives, but for rounding."""

    @property
    def adapter_ids(self) -> tuple[str, ...]:
        """Of the adapters that runs may ask for."""
        return self._active_adapter.known

    def unlike_blocks(self) -> list[int]:
        """The first block of each kind: alike are those with parameters of the same names and shapes."""
        kinds: dict[tuple[tuple[str, torch.Size], ...], int] = {}
        for index, block in self._blocks.items():
            kinds.setdefault(tuple((name, weight.shape) for name, weight in block.named_parameters()), index)
        return list(kinds.values())

    def new_pool(self, num_pages: int) -> KVPool:
        """Memory for the keys and values of many sessions; on a CPU it becomes resident as it is used."""
        return KVPool(self._layer_shapes, num_pages, self.device)

    def new_cache(
        self,
        batch_size: int,
        blocks: Span | None = None,
        max_length: int | None = None,
        pool: KVPool | None = None,
    ) -> SpanCache:
        """An empty cache of `blocks` (all of the span's) for `batch_size` sequences, of `max_length` tokens at most.

        It takes pages of the pool as tokens come; without one, of a pool of its own that grows as it has to.
        """
        span = blocks or self.span
        if pool is not None:
            return SpanCache(span, self._windows, pool, batch_size, max_length)
        shapes = {index: self._layer_shapes[index] for index in range(span.start, span.end)}
        own_pool = KVPool(shapes, own_pool_pages(batch_size, max_length), self.device)
        return SpanCache(span, self._windows, own_pool, batch_size, max_length, pool_grows=True)

    @torch.inference_mode()
    def prepare(self, cache: SpanCache, blocks: Span | None = None) -> PreparedStep | None:
        """What `run` can use for the next token of this cache, without padding; None where that would not be exact."""
        if not self.can_train:
            return None
        wanted = blocks or self.span
        return PreparedStep(cache, wanted, cache.length, self._collect_calls(cache.num_sequences, 1, cache, wanted, {}))

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
        prepared: PreparedStep | None = None,
        adapter: str | None = None,
        tuning: SpanTuning | None = None,
    ) -> torch.Tensor:
        """The hidden states after the last of `blocks` (all of the span's), shaped as those that came in.

        `hidden_states: [batch, tokens, hidden]` follow the first `position` tokens in the cache; whatever the cache
        holds after them is forgotten first. `attention_mask: [batch, position + tokens], bool`, False where there is
        padding. `position_ids: [batch, tokens], int64`; None counts on from `position`. On an exception the cache
        holds the first `position` tokens. Without a cache, `position` must be 0. What is `prepared` need not fit.
        `adapter`: one of `adapter_ids`; what is prepared is the same for all. `tuning`: of just these blocks, as
        `fit_tuning` returned it; it changes this run only.
        """
        self._active_adapter.choose(adapter)
        wanted = self._check_blocks(blocks, tuning)
        if cache is not None and cache.num_sequences != hidden_states.shape[0]:
            raise ValueError(f"the cache is of {cache.num_sequences} sequences, {hidden_states.shape[0]} have come")
        if cache is not None:
            cache.make_room(position, hidden_states.shape[1])
            cache.place()
        elif position != 0:
            raise ValueError(f"a run at position {position} needs a cache")
        arguments = self._arguments(attention_mask, position_ids)
        states = hidden_states.to(device=self.device, dtype=self.dtype)
        if prepared is not None and (arguments or not prepared.is_for(cache, wanted, position, states.shape[1])):
            prepared = None
        try:
            if tuning is not None:
                return self._run_tuned(states, cache, wanted, arguments, prepared, position, tuning)
            return self._run_blocks(states, cache, wanted, arguments, prepared)
        except BaseException:
            if cache is not None:
                cache.crop(min(position, cache.length))
            raise

    def fit_tuning(self, tuning: SpanTuning) -> SpanTuning:
        """The tuning as runs take it. Raises `ConfigError` where it does not fit the blocks it is for.

        May be called from any thread.
        """
        if tuning.prompts is not None and not self.can_train:
            raise ConfigError(
                "the tuning has prompts for each block, and none can be added between this model's blocks"
            )
        return fit_tuning(tuning, self._blocks, hidden_size=self.hidden_size, device=self.device)

    def start_backward(
        self,
        hidden_states: torch.Tensor,
        grad_outputs: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        blocks: Span | None = None,
        adapter: str | None = None,
        tuning: SpanTuning | None = None,
        num_noted: int = 1,
    ) -> RoundTrip:
        """Rows at the beginning of their way to the gradients of `hidden_states` and the tuning, where `grad_outputs`
        are those of what `run` returns for them without a cache: of the same shape, the other arguments as there.

        `num_noted`: how many of the blocks keep what their gradients need, up to all of them; what that takes and gains
        says `span_backward.py`. Only where `can_train`.
        """
        if grad_outputs.shape != hidden_states.shape:
            raise ValueError(
                f"the gradients have the shape {list(grad_outputs.shape)}, the inputs {list(hidden_states.shape)}"
            )
        if not self.can_train:
            raise UnsupportedModelError(
                f"no gradients come back through a {type(self._decoder).__name__}: between its blocks it does more "
                "than hand the hidden states on"
            )
        self._active_adapter.choose(adapter)
        wanted = self._check_blocks(blocks, tuning)
        batch_size, num_tokens, _ = hidden_states.shape
        arguments = self._arguments(attention_mask, position_ids)
        with torch.inference_mode(False), torch.no_grad():
            calls = self._collect_calls(batch_size, num_tokens, None, wanted, arguments)
            return RoundTrip(
                Way(
                    {index: self._blocks[index] for index in range(wanted.start, wanted.end)},
                    tree_map_only(torch.Tensor, _outside_inference, calls),
                    tuning,
                    self._tuned_layers,
                    partial(self._active_adapter.choose, adapter),
                ),
                _outside_inference(hidden_states.to(device=self.device, dtype=self.dtype)),
                _outside_inference(grad_outputs.to(device=self.device, dtype=self.dtype)),
                num_noted,
            )

    def run_backward(
        self,
        hidden_states: torch.Tensor,
        grad_outputs: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        blocks: Span | None = None,
        adapter: str | None = None,
        tuning: SpanTuning | None = None,
        num_noted: int = 1,
    ) -> Gradients:
        """What comes of `start_backward` when all its stages have been taken."""
        trip = self.start_backward(
            hidden_states,
            grad_outputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            blocks=blocks,
            adapter=adapter,
            tuning=tuning,
            num_noted=num_noted,
        )
        while not trip.is_done:
            trip.go_on(1)
        return trip.gradients

    @torch.inference_mode()
    def run_batch(self, steps: Sequence[BatchedStep], adapter: str | None = None) -> list[torch.Tensor]:
        """What `run` returns for each of the steps, but for rounding, in one pass through the weights.

        The caches are of different sessions, without padding, over the same blocks and the same pool, all with the same
        adapter. On an exception each holds the tokens before its position. Only where `can_batch`.
        """
        self._active_adapter.choose(adapter)
        pool, span = steps[0].cache.pool, steps[0].cache.span
        for step in steps:
            self._check_batched(step, pool, span)
            step.cache.make_room(step.position, 1)
        pool.carry_out()
        states = torch.cat([step.hidden_states.to(device=self.device, dtype=self.dtype) for step in steps])
        counts = [step.cache.num_sequences for step in steps]
        positions = [step.position for step in steps for _ in range(step.cache.num_sequences)]
        rows = Rows(pool, [step.cache for step in steps], [step.position for step in steps])
        cache = RowsCache(rows, pool, span, self._windows)
        arguments = {"position_ids": torch.tensor(positions, device=self.device)[:, None]}
        accepted = {name: value for name, value in arguments.items() if name in self._accepted}
        with attention_by_rows(self._config):
            output = self._run_decoder(states, cache, span, accepted)
        for step in steps:
            step.cache.advance(1)
        return list(torch.split(output, counts))

    def _check_batched(self, step: BatchedStep, pool: KVPool, span: Span) -> None:
        if step.cache.pool is not pool or step.cache.span != span:
            raise ValueError(f"the steps of a batch go through one span and one pool, not {span} and {step.cache.span}")
        wanted = [step.cache.num_sequences, 1, self.hidden_size]
        if list(step.hidden_states.shape) != wanted:
            raise ValueError(f"a step of a batch has the shape {wanted}, not {list(step.hidden_states.shape)}")

    def _check_blocks(self, blocks: Span | None, tuning: SpanTuning | None) -> Span:
        """Which blocks are to run."""
        wanted = blocks or self.span
        if not self.span.contains(wanted):
            raise ValueError(f"blocks {wanted} are not in the span {self.span}")
        if tuning is not None and tuning.blocks != wanted:
            raise ValueError(f"a tuning of the blocks {tuning.blocks} was given for a run of {wanted}")
        return wanted

    def _arguments(self, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> dict[str, Any]:
        """What the decoder is given beside the states and the cache."""
        named = {"attention_mask": attention_mask, "position_ids": position_ids}
        return {
            name: value.to(self.device) for name, value in named.items() if value is not None and name in self._accepted
        }

    def _collect_calls(
        self, batch_size: int, num_tokens: int, cache: SpanCache | None, blocks: Span, arguments: dict[str, Any]
    ) -> tuple[BlockCall, ...]:
        """What the decoder would call the blocks with after the hidden states. Only where `can_train`."""
        passage = self._passage
        passage.blocks, passage.calls = blocks, []
        try:
            placeholder = torch.zeros(batch_size, num_tokens, self.hidden_size, dtype=self.dtype, device=self.device)
            self._decoder(inputs_embeds=placeholder, past_key_values=cache, use_cache=cache is not None, **arguments)
            return tuple(passage.calls)
        finally:
            passage.calls = None

    def _run_tuned(
        self,
        states: torch.Tensor,
        cache: SpanCache | None,
        blocks: Span,
        arguments: dict[str, Any],
        prepared: PreparedStep | None,
        position: int,
        tuning: SpanTuning,
    ) -> torch.Tensor:
        batch_size, num_tokens, _ = states.shape
        prompts = tuning.prompts_at(position, num_tokens)
        with self._tuned_layers.applied(tuning.layers):
            if prompts is None:
                return self._run_blocks(states, cache, blocks, arguments, prepared)
            calls = self._collect_calls(batch_size, num_tokens, cache, blocks, arguments)
            return run_blocks(self._in_order(blocks), calls, states, prompts)

    def _run_blocks(
        self,
        states: torch.Tensor,
        cache: SpanCache | None,
        blocks: Span,
        arguments: dict[str, Any],
        prepared: PreparedStep | None,
    ) -> torch.Tensor:
        if prepared is not None:
            return run_blocks(self._in_order(blocks), prepared.calls, states)
        return self._run_decoder(states, cache, blocks, arguments)

    def _in_order(self, blocks: Span) -> Iterator[nn.Module]:
        return (self._blocks[index] for index in range(blocks.start, blocks.end))

    def _run_decoder(
        self, states: torch.Tensor, cache: Cache | None, blocks: Span, arguments: dict[str, Any]
    ) -> torch.Tensor:
        passage = self._passage
        passage.blocks, passage.hidden_states, passage.output = blocks, states, None
        try:
            # Zeros of the right shape: some models scale in place what they are given for embeddings.
            placeholder = torch.zeros_like(states)
            self._decoder(inputs_embeds=placeholder, past_key_values=cache, use_cache=cache is not None, **arguments)
            assert passage.output is not None, "the decoder did not run its blocks"
            return passage.output
        finally:
            passage.hidden_states = passage.output = None

    @torch.inference_mode()
    def _try_out(self) -> None:
        """Runs one token: shows that the span works, and what each of its layers keeps of a token."""

        def run(cache: Cache) -> None:
            token = torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
            self._run_decoder(token, cache, self.span, {})

        self._layer_shapes = kept_layers(run, self.span, self._windows, type(self._decoder).__name__)
        self.cache_bytes_per_token = sum(shape.size_bytes for shape in self._layer_shapes.values())


def _outside_inference(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as autograd can take it up."""
    return tensor.clone() if tensor.is_inference() else tensor


def load_span(
    source: WeightSource,
    span: Span,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Quantization = Quantization.NONE,
    adapters: Sequence[Adapter] = (),
) -> SpanModel:
    """The span of the checkpoint's model, with only its own tensors read, and those of the adapters that change it.

    Raises `UnsupportedModelError`, `CheckpointError`, or `ConfigError` when the model has no such blocks or the device
    cannot hold them so.
    """
    device = torch.device(device)
    with LOADING:
        layout = lay_out(source.config, dtype)
        if span.end > layout.num_blocks:
            raise ConfigError(f"{source.name} has the blocks 0:{layout.num_blocks}, so not {span}")
        for index, layer in enumerate(layout.blocks):
            if span.covers(index):
                check_quantizable(layer, quantization, device)
            else:
                layout.blocks[index] = PassThrough(layer)
        layout.model.set_submodule(layout.blocks_path, BlockList(layout.blocks))
        empty_outside(layout.model, layout.blocks_path)
        if quantization is Quantization.NONE:
            load_weights(layout.model, source, dtype=dtype, device=device)
        else:
            load_quantized(layout, span, source, quantization, dtype=dtype, device=device)
        loaded = [adapter.load(span, dtype=dtype, device=device) for adapter in adapters]
        model = SpanModel(layout, span, dtype=dtype, device=device, adapters=loaded)
        source.release()  # a mapped file whose weights were all copied takes no memory any more
        return model
