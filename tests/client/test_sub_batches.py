"""Batches are cut by rows, alike and in order; tunings are cut by blocks, and their gradients put together."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.step_input import StepInput, in_rows
from p2pswarm.client.training import tokens_at_once
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span

HIDDEN_SIZE = 4


def numbered(batch_size: int, num_tokens: int) -> StepInput:
    """Every row and token another number, in all that belongs to it."""
    numbers = torch.arange(batch_size * num_tokens).view(batch_size, num_tokens)
    return StepInput(numbers[..., None].expand(-1, -1, HIDDEN_SIZE).float(), 0, numbers % 3 > 0, numbers)


@settings(deadline=None)
@given(
    batch_size=st.integers(1, 40),
    num_tokens=st.integers(1, 20),
    max_tokens=st.integers(1, 300),
    max_bytes=st.integers(1, 3000),
)
def test_parts_hold_all_rows_in_order_alike_and_within_bounds(
    batch_size: int, num_tokens: int, max_tokens: int, max_bytes: int
) -> None:
    batch = numbered(batch_size, num_tokens)
    parts = in_rows(batch, max_tokens, max_bytes)
    assert torch.equal(torch.cat([part.hidden_states for part in parts]), batch.hidden_states)
    for part in parts:
        part.check()
        assert part.position_ids is not None
        assert part.attention_mask is not None
        assert torch.equal(part.position_ids.float(), part.hidden_states[..., 0])
        assert torch.equal(part.attention_mask, part.position_ids % 3 > 0)
        assert part.batch_size == 1 or part.num_tokens_in_total <= max_tokens
        assert part.batch_size == 1 or part.hidden_states.nbytes <= max_bytes
    sizes = [part.batch_size for part in parts]
    assert max(sizes) - min(sizes) <= 1
    rows_at_once = max(1, min(max_tokens // num_tokens, max_bytes // (num_tokens * HIDDEN_SIZE * 4)))
    assert len(parts) == -(-batch_size // rows_at_once)


@pytest.mark.parametrize(
    ("batch_size", "num_tokens", "sizes"),
    [
        (2, 100, [2]),  # nothing to gain
        (8, 128, [2] * 4),  # four servers at once
        (32, 128, [5, 5, 5, 5, 4, 4, 4]),
        (64, 128, [8] * 8),  # as large as they may be
        (3, 4000, [1] * 3),  # rows stay whole
    ],
)
def test_batches_are_cut_for_as_many_servers_as_are_asked_at_once(
    batch_size: int, num_tokens: int, sizes: list[int]
) -> None:
    batch, config = numbered(batch_size, num_tokens), ClientConfig()
    parts = in_rows(batch, tokens_at_once(batch, config), config.max_step_bytes)
    assert [part.batch_size for part in parts] == sizes


def test_a_batch_without_masks_stays_without() -> None:
    parts = in_rows(StepInput(torch.zeros(4, 3, HIDDEN_SIZE), 0), 6, 1 << 20)
    assert [part.hidden_states.shape[0] for part in parts] == [2, 2]
    assert all(part.attention_mask is None and part.position_ids is None for part in parts)


def whole_tuning() -> Tuning:
    generator = torch.Generator().manual_seed(0)
    layers = {
        place: LowRank(torch.randn(2, 5, generator=generator), torch.randn(3, 2, generator=generator))
        for place in ((1, "b"), (0, "z"), (1, "a"), (3, "a"))
    }
    return Tuning(torch.randn(4, 2, HIDDEN_SIZE, generator=generator), layers)


def test_tensors_come_in_the_order_in_which_layers_travel() -> None:
    tuning = whole_tuning()
    assert tuning.places == [(0, "z"), (1, "a"), (1, "b"), (3, "a")]
    again = tuning.with_tensors(tuning.tensors)
    assert all(one is other for one, other in zip(again.tensors, tuning.tensors, strict=True))
    assert tuning.num_bytes == 4 * (4 * 2 * HIDDEN_SIZE + 4 * (10 + 6))


@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 4), (0, 2, 3, 4), (0, 1, 2, 3, 4)], ids=str)
def test_parts_for_spans_are_the_whole_put_together(cuts: tuple[int, ...]) -> None:
    tuning = whole_tuning()
    total = tuning.zeros()
    for start, end in pairwise(cuts):
        part = tuning.for_span(Span(start, end))
        assert part is not None
        assert {layer.block for layer in part.layers} <= set(range(start, end))
        total.add(Span(start, end), part)
        total.add(Span(start, end), part)
    for one, other in zip(total.tensors, tuning.tensors, strict=True):
        assert torch.equal(one, 2 * other)


def test_blocks_that_are_not_tuned_bring_nothing_along() -> None:
    tuning = Tuning(None, whole_tuning().layers)
    assert tuning.for_span(Span(2, 3)) is None
    assert tuning.for_span(Span(2, 4)) is not None


def test_a_copy_is_out_of_the_graph_and_stays_as_it_was() -> None:
    tuning = whole_tuning()
    live = tuning.with_tensors([tensor.clone().requires_grad_() for tensor in tuning.tensors])
    copy = live.detached()
    with torch.no_grad():
        for tensor in live.tensors:
            tensor.zero_()
    assert all(map(torch.equal, copy.tensors, tuning.tensors))
    assert not any(tensor.requires_grad for tensor in copy.tensors)


@pytest.mark.parametrize(
    ("prompts", "layers", "message"),
    [
        (None, {}, "holds prompts or layers"),
        (torch.zeros(2, 3), {}, r"prompts are \[blocks, prompt tokens, hidden\], got \[2, 3\]"),
        (
            None,
            {(1, "a"): LowRank(torch.zeros(2, 5), torch.zeros(3, 1))},
            r"block 1 a takes down.*\[2, 5\] and \[3, 1\]",
        ),
        (torch.zeros(2, 3, 4, dtype=torch.bfloat16), {}, "are torch.float32, got torch.bfloat16"),
    ],
)
def test_a_tuning_that_no_model_could_have_is_refused(prompts, layers, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tuning(prompts, layers)


@pytest.mark.parametrize("name", ["max_training_tokens", "max_training_calls"])
def test_impossible_numbers_of_training_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 1 or more, got 0"):
        ClientConfig(**{name: 0})
