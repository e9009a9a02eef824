"""As many blocks as fit beside their KV cache, and a clear refusal where not even one does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span
from swarmd.kv_size import MIN_TOKENS, SENSIBLE_TOKENS, KVBytes, KVShare, KVSize, KVTokens
from swarmd.sizing import BlockNeeds, check_span_fits, count_blocks, kept_kv_bytes
from swarmd.training_memory import BackwardMemory, Growth, with_gaps

MIB, GIB = 1 << 20, 1 << 30
EQUAL = BlockNeeds((100 * MIB,) * 30, kv_bytes_per_token=1024, working_bytes=50 * MIB)
"""8 MiB of KV cache a block by default."""


def test_the_free_memory_is_divided_and_the_parts_are_told() -> None:
    count = count_blocks(EQUAL, free_bytes=1500 * MIB, spare_share=0.2, kv_size=None)
    assert count.num_blocks == 10  # 1200 MiB less 50, by 108
    assert count.num_model_blocks == 30
    assert (count.free_bytes, count.spare_bytes) == (1500 * MIB, 300 * MIB)
    assert (count.block_bytes, count.kv_bytes, count.working_bytes) == (100 * MIB, 80 * MIB, 50 * MIB)


def test_no_more_blocks_than_the_model_has() -> None:
    assert count_blocks(EQUAL, free_bytes=1000 * GIB, spare_share=0.2, kv_size=None).num_blocks == 30


def test_a_larger_kv_cache_leaves_room_for_fewer_blocks() -> None:
    def blocks(kv_size: KVSize | None) -> int:
        return count_blocks(EQUAL, 2000 * MIB, 0.0, kv_size).num_blocks

    assert [blocks(size) for size in (KVTokens(1), None, KVTokens(4 * SENSIBLE_TOKENS), KVBytes(GIB))] == [
        19,
        18,
        14,
        9,
    ]


def test_of_a_share_one_chat_is_kept_for_certain() -> None:
    assert kept_kv_bytes(EQUAL, 10, KVShare(0.9)) == MIN_TOKENS * 10 * 1024


def test_blocks_of_different_weight_fit_wherever_they_are() -> None:
    needs = BlockNeeds((10, 10, 10, 40, 40, 10), kv_bytes_per_token=0, working_bytes=0)
    assert [needs.largest_span_bytes(num_blocks) for num_blocks in range(1, 7)] == [40, 80, 90, 100, 110, 120]
    assert count_blocks(needs, free_bytes=95, spare_share=0.0, kv_size=None).num_blocks == 3


def test_too_little_memory_for_one_block_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        ConfigError,
        match=r"too little memory for one block: 80 MiB can be used \(100 MiB are free\), wanted 158 MiB "
        r"\(100 MiB weights, 8\.0 MiB KV cache, 50 MiB to work in\)\. .*--dtype bfloat16.*--quant nf4.*--kv-cache",
    ):
        count_blocks(EQUAL, free_bytes=100 * MIB, spare_share=0.2, kv_size=None)


def test_blocks_asked_for_that_do_not_fit_are_refused_with_how_many_would() -> None:
    weights_bytes = EQUAL.weights_bytes
    check_span_fits(weights_bytes, Span(5, 10), free_bytes=500 * MIB)
    with pytest.raises(
        ConfigError, match=r"blocks 5:15 take 1000 MiB, and 450 MiB are free \(4 would fit\)\. Serve fewer"
    ):
        check_span_fits(weights_bytes, Span(5, 15), free_bytes=450 * MIB)
    with pytest.raises(ConfigError, match=r"\(not even one fits\)"):
        check_span_fits(weights_bytes, Span(5, 6), free_bytes=99 * MIB)


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=12),
    st.integers(0, 3),
    st.integers(0, 500),
    st.integers(0, 100_000),
    st.floats(0, 0.5),
    st.none() | st.builds(KVBytes, st.integers(1, 5000)) | st.builds(KVTokens, st.integers(1, 100)),
)
def test_what_is_chosen_fits_and_one_more_would_not(
    weights: list[int], kv_bytes: int, working_bytes: int, free_bytes: int, spare: float, kv_size: KVSize | None
) -> None:
    needs = BlockNeeds(tuple(weights), kv_bytes, working_bytes)

    def taken(num_blocks: int) -> int:
        return needs.largest_span_bytes(num_blocks) + kept_kv_bytes(needs, num_blocks, kv_size) + working_bytes

    try:
        count = count_blocks(needs, free_bytes, spare, kv_size)
    except ConfigError:
        assert taken(1) > free_bytes - int(free_bytes * spare) - 1
        return
    assert taken(count.num_blocks) + count.spare_bytes <= free_bytes
    assert count.num_blocks == len(weights) or taken(count.num_blocks + 1) + count.spare_bytes > free_bytes


def test_room_for_gradients_is_that_of_the_largest_of_what_runs_one_at_a_time() -> None:
    backward = BackwardMemory(10 * MIB, (Growth(50 * 1024.0, 0.0),), state_bytes=2048)
    needs = BlockNeeds(EQUAL.weights_bytes, EQUAL.kv_bytes_per_token, EQUAL.working_bytes, backward)
    count = count_blocks(needs, 1500 * MIB, 0.2, None)
    assert count.num_blocks == 9
    assert count.working_bytes == with_gaps(10 * MIB + 2048 * (50 * 1024 + 9 * 2048))
    assert count_blocks(needs, 1500 * MIB, 0.2, None, training_bytes=60 * MIB).num_blocks == 10
    small = count_blocks(needs, 1500 * MIB, 0.2, None, training_bytes=1 * MIB)
    assert small.working_bytes == EQUAL.working_bytes
    with pytest.raises(ConfigError, match=r"1000 MiB to work in\)\. .*--training-memory 64MiB"):
        count_blocks(needs, 1000 * MIB, 0.2, None, training_bytes=1000 * MIB)
