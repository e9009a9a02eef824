from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.blocks.kv_pool import KVPool, LayerShape, StateShape
from p2pswarm.blocks.pages import PAGE_TOKENS, OutOfPages
from p2pswarm.core.span import Span

HEADS, HEAD_SIZE = 2, 4
FIRST_BLOCK = Span(0, 1)
STATES = StateShape(HEADS, HEAD_SIZE, torch.float32)


def new_states(num_tokens: int, batch_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch_size, HEADS, num_tokens, HEAD_SIZE), torch.randn(batch_size, HEADS, num_tokens, HEAD_SIZE)


def pool_of(num_pages: int, span: Span = FIRST_BLOCK) -> KVPool:
    shapes = {index: LayerShape(STATES, STATES) for index in range(span.start, span.end)}
    return KVPool(shapes, num_pages, torch.device("cpu"))


def one_layer(pool: KVPool, window: int | None = None, batch_size: int = 1) -> SpanCache:
    return SpanCache(FIRST_BLOCK, [window], pool, batch_size, 10 * PAGE_TOKENS)


def update(
    cache: SpanCache, states: tuple[torch.Tensor, torch.Tensor], position: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    cache.make_room(cache.length if position is None else position, states[0].shape[2])
    cache.place()
    shown: tuple[torch.Tensor, torch.Tensor] = cache.update(*states, 0)
    return shown


@given(
    chunks=st.lists(st.integers(1, 70), min_size=1, max_size=12),
    window=st.none() | st.integers(2, 40),
    batch_size=st.integers(1, 3),
    others=st.lists(st.integers(0, 40), min_size=12, max_size=12),
)
@settings(deadline=None, max_examples=60)
def test_a_layer_shows_what_transformers_own_shows(
    chunks: Sequence[int], window: int | None, batch_size: int, others: Sequence[int]
) -> None:
    """Also where other sessions grow beside it, so that it has to move or to scatter."""
    pool = pool_of(200)
    ours = one_layer(pool, window, batch_size)
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)  # type: ignore[no-untyped-call]
    neighbours = []

    for num_tokens, num_others in zip(chunks, others, strict=False):
        keys, values = new_states(num_tokens, batch_size)
        sizes = theirs.get_mask_sizes(num_tokens)
        expected = theirs.update(keys, values)
        assert ours.get_mask_sizes(num_tokens, 0) == sizes
        got = update(ours, (keys, values))
        assert all(map(torch.equal, got, expected))
        assert ours.get_seq_length() == theirs.get_seq_length()
        if num_others:
            neighbours.append(one_layer(pool))
            update(neighbours[-1], new_states(num_others))


@given(data=st.data(), window=st.none() | st.integers(2, 20))
@settings(deadline=None, max_examples=60)
def test_a_layer_cut_back_is_as_if_the_rest_had_never_come(data: st.DataObject, window: int | None) -> None:
    pool = pool_of(40)
    cut, history = one_layer(pool, window), torch.empty(1, HEADS, 0, HEAD_SIZE)
    for _ in range(6):
        keys, values = new_states(data.draw(st.integers(1, 50)))
        update(cut, (keys, values), history.shape[-2])
        history = torch.cat([history, keys], dim=-2)
        history = history[..., : data.draw(st.integers(0, history.shape[-2])), :]

    fresh = one_layer(pool, window)
    if history.shape[-2]:
        update(fresh, (history, history))
    keys, values = new_states(3)

    assert torch.equal(update(cut, (keys, values), history.shape[-2])[0], update(fresh, (keys, values))[0])


def test_pages_are_taken_and_given_back_as_tokens_come_and_go() -> None:
    pool = pool_of(100)
    cache = one_layer(pool, batch_size=2)

    assert cache.pages_needed(0, PAGE_TOKENS + 1) == 4
    update(cache, new_states(PAGE_TOKENS + 1, batch_size=2))
    assert cache.num_pages == pool.pages.num_used == 4
    assert cache.size_bytes == pool.used_bytes == 4 * PAGE_TOKENS * 2 * HEADS * HEAD_SIZE * 4
    assert cache.pages_needed(cache.length, PAGE_TOKENS - 1) == 0
    assert cache.pages_needed(cache.length, PAGE_TOKENS) == 2

    assert cache.pages_needed(PAGE_TOKENS, 0) == -2
    cache.make_room(PAGE_TOKENS, 0)
    assert cache.num_pages == pool.pages.num_used == 2
    cache.release()
    cache.release()
    assert (cache.num_pages, pool.used_bytes) == (0, 0)


def test_without_pages_a_cache_stays_as_it_was() -> None:
    pool = pool_of(3)
    cache, other = one_layer(pool), one_layer(pool)
    keys, values = new_states(40)
    update(cache, (keys, values))
    update(other, new_states(5))

    with pytest.raises(OutOfPages) as raised:
        cache.make_room(20, 60)

    assert raised.value.num_missing == 1
    assert (cache.length, cache.num_pages) == (40, 2)
    other.release()
    assert torch.equal(update(cache, new_states(56))[0][:, :, :40], keys)


def test_a_pool_of_its_own_grows_with_its_cache() -> None:
    cache = SpanCache(FIRST_BLOCK, [None], pool_of(1), 2, pool_grows=True)
    keys, values = new_states(1000, batch_size=2)

    for start in range(0, 1000, 50):
        shown = update(cache, (keys[:, :, start : start + 50], values[:, :, start : start + 50]))

    assert torch.equal(shown[0], keys)
    assert torch.equal(shown[1], values)


def test_layers_outside_the_span_answer_as_their_kind_inside_does() -> None:
    span = Span(2, 4)
    cache = SpanCache(span, [None, 8, None, 8, None, 8], pool_of(4, span), batch_size=1)
    cache.make_room(0, 10)
    cache.place()
    for index in (2, 3):
        cache.update(*new_states(10), index)

    assert cache.length == 10
    assert [cache.get_seq_length(index) for index in range(6)] == [10] * 6
    assert [cache.get_mask_sizes(1, index) for index in range(6)] == [(11, 0), (8, 3)] * 3
    assert cache.is_sliding == [False, True] * 3


def test_rows_are_reordered_and_may_be_repeated() -> None:
    cache = one_layer(pool_of(10), batch_size=3)
    keys, values = new_states(5, batch_size=3)
    update(cache, (keys, values))

    cache.reorder(torch.tensor([2, 0, 0]))
    shown, _ = update(cache, new_states(1, batch_size=3))

    assert torch.equal(shown[:, :, :5], keys[[2, 0, 0]])
    with pytest.raises(ValueError, match="3 rows cannot take"):
        cache.reorder(torch.tensor([0, 1]))


def test_beams_that_part_copy_no_more_than_their_last_page() -> None:
    pool = pool_of(60)
    cache = one_layer(pool, batch_size=4)
    keys, values = new_states(7 * PAGE_TOKENS + 5, batch_size=4)
    update(cache, (keys, values))

    for step, beams in enumerate(([1, 1, 0, 3], [0, 0, 0, 0], [3, 2, 1, 0])):
        cache.make_room(cache.length, 1, beams)
        cache.place()
        word = new_states(1, batch_size=4)
        keys, values = (torch.cat([old[beams], new], dim=2) for old, new in zip((keys, values), word, strict=True))
        shown = cache.update(*word, 0)
        assert torch.equal(shown[0], keys)
        assert torch.equal(shown[1], values)
        num_copied = [1 * 5, 1 * 5 + 3 * 6, 1 * 5 + 3 * 6][step]
        assert pool.num_copied_bytes == num_copied * 2 * HEADS * HEAD_SIZE * 4


def test_a_cache_goes_on_only_from_what_it_holds() -> None:
    cache = one_layer(pool_of(4))
    update(cache, new_states(5))

    with pytest.raises(ValueError, match="of 5 tokens cannot be cut to 6"):
        cache.crop(6)
    with pytest.raises(ValueError, match="of 5 tokens cannot go on at position 6"):
        cache.make_room(6, 1)
    cache.crop(0)
    assert cache.length == 0
