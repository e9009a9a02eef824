from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from p2pswarm.blocks.kv_cache import FIRST_CAPACITY_TOKENS, GrowingLayer, SpanCache
from p2pswarm.core.span import Span

HEADS, HEAD_SIZE = 2, 4


def new_states(num_tokens: int, batch_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch_size, HEADS, num_tokens, HEAD_SIZE), torch.randn(batch_size, HEADS, num_tokens, HEAD_SIZE)


@given(chunks=st.lists(st.integers(1, 70), min_size=1, max_size=12), window=st.none() | st.integers(2, 40))
@settings(deadline=None, max_examples=60)
def test_a_layer_shows_what_transformers_own_shows(chunks: Sequence[int], window: int | None) -> None:
    ours = GrowingLayer(window)
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)

    for num_tokens in chunks:
        keys, values = new_states(num_tokens)
        sizes = theirs.get_mask_sizes(num_tokens)
        expected = theirs.update(keys, values)
        assert ours.get_mask_sizes(num_tokens) == sizes
        got = ours.update(keys, values)
        assert all(map(torch.equal, got, expected))
        assert ours.get_seq_length() == theirs.get_seq_length()


@given(data=st.data(), window=st.none() | st.integers(2, 20))
@settings(deadline=None, max_examples=60)
def test_a_layer_cut_back_is_as_if_the_rest_had_never_come(data: st.DataObject, window: int | None) -> None:
    cut, history = GrowingLayer(window), torch.empty(1, HEADS, 0, HEAD_SIZE)
    for _ in range(6):
        keys, values = new_states(data.draw(st.integers(1, 50)))
        cut.update(keys, values)
        length = data.draw(st.integers(0, cut.length))
        history = torch.cat([history, keys], dim=-2)[..., :length, :]
        cut.cut(length)

    fresh = GrowingLayer(window)
    if history.shape[-2]:
        fresh.update(history, history)
    keys, values = new_states(3)

    assert torch.equal(cut.update(keys, values)[0], fresh.update(keys, values)[0])


def test_memory_is_taken_in_steps() -> None:
    layer = GrowingLayer()
    capacities = set()
    for _ in range(5000):
        layer.update(*new_states(1))
        capacities.add(layer.capacity)

    assert sorted(capacities)[:4] == [128, 256, 512, 1024]
    assert len(capacities) < 10
    assert layer.size_bytes == 2 * layer.capacity * HEADS * HEAD_SIZE * 4


def test_no_more_memory_is_taken_than_the_longest_session_needs() -> None:
    layer = GrowingLayer(max_length=300)
    for _ in range(300):
        layer.update(*new_states(1))

    assert layer.capacity == 300


def test_layers_outside_the_span_answer_as_their_kind_inside_does() -> None:
    cache = SpanCache(Span(2, 4), [None, 8, None, 8, None, 8], batch_size=1)
    for index in (2, 3):
        cache.update(*new_states(10), index)

    assert cache.length == 10
    assert [cache.get_seq_length(index) for index in range(6)] == [10] * 6
    assert [cache.get_mask_sizes(1, index) for index in range(6)] == [(11, 0), (8, 3)] * 3
    assert cache.is_sliding == [False, True] * 3


def test_rows_are_reordered_and_may_be_repeated() -> None:
    cache = SpanCache(Span(0, 1), [None], batch_size=3)
    keys, values = new_states(5, batch_size=3)
    cache.update(keys, values, 0)

    cache.reorder(torch.tensor([2, 0, 0]))
    shown, _ = cache.update(*new_states(1, batch_size=3), 0)

    assert torch.equal(shown[:, :, :5], keys[[2, 0, 0]])
    with pytest.raises(ValueError, match="3 rows cannot take"):
        cache.reorder(torch.tensor([0, 1]))


def test_a_cache_is_not_cut_to_more_than_it_holds() -> None:
    cache = SpanCache(Span(0, 1), [None], batch_size=1)
    cache.update(*new_states(5), 0)

    with pytest.raises(ValueError, match="of 5 tokens cannot be cut to 6"):
        cache.crop(6)
    cache.crop(0)
    assert cache.length == 0
    assert cache.held[0].capacity == FIRST_CAPACITY_TOKENS
