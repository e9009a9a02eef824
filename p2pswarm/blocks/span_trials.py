"""What a span can do, found out by trying it when it is loaded: nothing here knows how an architecture is made.

Whether it runs at all and what its layers keep of a token, whether a prepared step is exact, whether steps of several
sessions may run as one.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.blocks.kv_pool import KVPool, LayerShape, StateShape
from p2pswarm.blocks.span_steps import BatchedStep, PreparedStep
from p2pswarm.core.errors import UnsupportedModelError
from p2pswarm.core.span import Span

MODEL_CODE_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What transformers' code raises when it meets a model in pieces that it cannot run."""

TRIED_LENGTHS = (10, 3)
"""Tokens of the sessions with which batches are tried: as few as show that each keeps its own, at every start."""


class TriedSpan(Protocol):
    """What trials need of a span; `SpanModel` says what these do."""

    hidden_size: int

    def new_pool(self, num_pages: int) -> KVPool: ...

    def new_cache(self, batch_size: int, *, pool: KVPool | None = None) -> SpanCache: ...

    def prepare(self, cache: SpanCache) -> PreparedStep | None: ...

    def run(
        self,
        hidden_states: torch.Tensor,
        cache: SpanCache | None,
        *,
        position: int,
        prepared: PreparedStep | None = None,
    ) -> torch.Tensor: ...

    def run_batch(self, steps: Sequence[BatchedStep]) -> list[torch.Tensor]: ...


def kept_layers(
    run_token: Callable[[Cache], None], span: Span, windows: Sequence[int | None], name: str
) -> dict[int, LayerShape]:
    """What each of the span's layers keeps of a token, of which `run_token` runs one through it.

    `windows`: of all layers of the model. Raises `UnsupportedModelError` where a `name` does not work so.
    """
    layers: list[Any] = [
        DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)  # type: ignore[no-untyped-call]
        for window in windows
    ]
    try:
        run_token(Cache(layers=layers))
    except MODEL_CODE_FAILURES as error:
        raise UnsupportedModelError(f"a {name} cannot run only some of its blocks: {error!r}") from error
    indices = range(span.start, span.end)
    forgetful = [index for index in indices if layers[index].get_seq_length() != 1]
    if forgetful:
        raise UnsupportedModelError(
            f"the blocks {', '.join(map(str, forgetful))} keep no keys and values of their own, "
            "so they cannot be served apart from others"
        )
    return {index: _layer_shape(layers[index]) for index in indices}


def prepares_exactly(span: TriedSpan) -> bool:
    """Tries whether a prepared token comes out bit for bit as any other: whether all that this model does between its
    blocks is to hand the hidden states on. Another session's token is prepared in between.
    """
    first, second = torch.randn(2, 1, 1, span.hidden_size, generator=torch.Generator().manual_seed(0))
    cache = span.new_cache(1)
    try:
        span.run(first, cache, position=0)
        expected = span.run(second, cache, position=1)
        cache.crop(1)
        prepared = span.prepare(cache)
        span.prepare(span.new_cache(1))
        return torch.equal(span.run(second, cache, position=1, prepared=prepared), expected)
    except MODEL_CODE_FAILURES:
        return False


def batches_exactly(span: TriedSpan, rounding: float) -> bool:
    """Tries two sessions of different lengths apart and together. `rounding`: of one operation, relative."""
    generator = torch.Generator().manual_seed(0)
    pool = span.new_pool(len(TRIED_LENGTHS))
    try:
        steps = []
        for length in TRIED_LENGTHS:
            states = torch.randn(1, length + 1, span.hidden_size, generator=generator)
            cache = span.new_cache(1, pool=pool)
            span.run(states[:, :length], cache, position=0)
            steps.append(BatchedStep(cache, states[:, length:], length))
        apart = [span.run(step.hidden_states, step.cache, position=step.position) for step in steps]
        together = span.run_batch(steps)
    except MODEL_CODE_FAILURES:
        return False
    tolerance = rounding**0.5
    return all(
        torch.dist(got, expected) <= tolerance * torch.dist(expected, step.hidden_states.to(expected))
        for step, expected, got in zip(steps, apart, together, strict=True)
    )


def _layer_shape(layer: CacheLayerMixin) -> LayerShape:
    """What a layer of transformers' own cache has kept."""
    keys, values = (
        StateShape(states.shape[1], states.shape[3], states.dtype)
        for states in (layer.keys, layer.values)
        if states is not None
    )
    return LayerShape(keys, values)
