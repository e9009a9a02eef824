"""What gradients take is what they are said to take, and never more than there is for them."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tunings import wired

from p2pswarm.blocks.adapters import LowRank, linear_size
from p2pswarm.blocks.span_backward import num_stages
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.errors import BadRequest
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.tuning import TunedLayer, WireTuning
from swarmd.training_memory import (
    AskedRows,
    BackwardMemory,
    Growth,
    TripSize,
    TunedBytes,
    trip_size,
    tuned_bytes,
    with_gaps,
)
from swarmd.working_memory import backward_history, backward_memory, notes_bytes, tensor_bytes

MIB = 1 << 20
HIDDEN_SIZE = 64
SPAN = Span(2, 6)
MEMORY = BackwardMemory(1000, (Growth(100.0, 1.0), Growth(200.0, 0.5)), state_bytes=10, notes=Growth(80.0, 0.5))
PASS_TOKENS = 16.0


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "falcon", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_row_of_any_length_takes_is_known_from_short_ones(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path / "tiny", model_type)))
    model = load_span(checkpoint, Span(0, 2), dtype=dtype)
    memory = backward_memory(model)
    for num_tokens in (3, 50, 250):
        measured_bytes = max(backward_history(model, 0, num_tokens))
        said_bytes = memory.fixed_bytes + memory.row_bytes(num_tokens, num_blocks=0)
        assert measured_bytes <= 1.001 * said_bytes
        assert said_bytes <= 1.05 * measured_bytes + 2048
        noted_bytes = notes_bytes(model, 0, num_tokens)
        said_bytes = memory.fixed_notes_bytes + round(memory.notes.row_bytes(num_tokens))
        assert noted_bytes <= said_bytes <= 1.001 * noted_bytes


def full_tuning(model: SpanModel, rank: int) -> SpanTuning:
    """Every linear layer of every block, and prompts."""
    layers = {
        index: {
            path: LowRank(torch.randn(rank, size[0]), torch.randn(size[1], rank))
            for path, layer in block.named_modules()
            if (size := linear_size(layer)) is not None
        }
        for index, block in model._blocks.items()
    }
    return SpanTuning(model.span, torch.randn(model.span.num_blocks, 7, model.hidden_size), layers)


@pytest.mark.parametrize("rank", [None, 1, 32])
@pytest.mark.parametrize("num_tokens", [1, 16, 60])
@pytest.mark.parametrize("num_noted", [1, 2, 4])
def test_rows_under_way_keep_to_their_memory(
    tiny_span: SpanModel, rank: int | None, num_tokens: int, num_noted: int
) -> None:
    tuning = None if rank is None else tiny_span.fit_tuning(full_tuning(tiny_span, rank))
    tuned = TunedBytes() if tuning is None else tuned_bytes(wired(tuning))
    memory, limit_bytes = backward_memory(tiny_span), 3 * MIB
    num_rows = memory.rows_within(limit_bytes, num_tokens, SPAN.num_blocks, num_noted, tuned)
    mask = torch.ones(num_rows, num_tokens, dtype=torch.bool)
    mask[:, : num_tokens // 2] = False

    def there_and_back() -> None:
        with torch.inference_mode(False):
            states, gradients = torch.zeros(2, num_rows, num_tokens, HIDDEN_SIZE)
        tiny_span.run_backward(states, gradients, attention_mask=mask, tuning=tuning, num_noted=num_noted)

    tuning_bytes = 0 if tuning is None else tuning.num_bytes
    taken_bytes = max(tensor_bytes(there_and_back))
    assert taken_bytes <= limit_bytes + tuning_bytes
    assert taken_bytes >= 0.3 * limit_bytes


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "qwen3_moe", "gpt_oss", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize(("num_rows", "num_tokens"), [(1, 1), (1, 20), (3, 20)])
def test_few_rows_through_blocks_of_any_kind_take_no_more_than_is_said(
    model_type: str, num_rows: int, num_tokens: int, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path / "tiny", model_type)))
    model = load_span(checkpoint, Span(0, 4))  # in one of them, the first is of another kind than the others
    memory = backward_memory(model)
    for num_noted in range(1, SPAN.num_blocks + 1):

        def there_and_back(num_noted: int) -> None:
            with torch.inference_mode(False):
                states, gradients = torch.randn(2, num_rows, num_tokens, HIDDEN_SIZE)
            model.run_backward(states, gradients, num_noted=num_noted)

        taken_bytes = max(tensor_bytes(partial(there_and_back, num_noted)))
        assert memory.rows_within(taken_bytes - 1, num_tokens, SPAN.num_blocks, num_noted) < num_rows


def size_of(tensor_bytes: int, num_rows: int, num_tokens: int, **more: Any) -> TripSize:
    """Where the tensors may take so many bytes."""
    rows = AskedRows(num_rows, num_tokens, Span(3, 7), None)
    return trip_size(MEMORY, with_gaps(tensor_bytes), rows, **{"max_length": 500, "pass_tokens": PASS_TOKENS, **more})


def test_a_row_that_does_not_fit_is_refused_with_how_many_tokens_do() -> None:
    assert size_of(21_000, 1, 72) == TripSize(1, 1)
    with pytest.raises(
        BadRequest,
        match=r"gradients of a row of 90 tokens through blocks 3:7 take 37 KiB, and this server has 29 KiB for them "
        r"\(--training-memory\): rows of up to 72 tokens fit",
    ):
        size_of(21_000, 5, 90)
    with pytest.raises(BadRequest, match="rows of up to 0 tokens fit"):
        size_of(1000, 1, 1)


def test_blocks_keep_notes_where_they_have_room_for_them() -> None:
    num_tokens = 100
    by_noted = [MEMORY.row_bytes(num_tokens, 4, num_noted) for num_noted in range(1, 5)]
    assert [after - before for before, after in pairwise(by_noted)] == [100 * 80 + 100 * 100 // 2] * 3
    assert [size_of(1000 + limit, 1, num_tokens).num_noted for limit in by_noted] == [1, 2, 3, 4]
    assert size_of(999 + by_noted[1], 1, num_tokens).num_noted == 1


def test_rows_go_together_where_reading_the_weights_costs_more_than_running_blocks_once_more() -> None:
    room_for_four = 1000 + 4 * MEMORY.row_bytes(2, 4)
    assert size_of(room_for_four, 4, 2, pass_tokens=0.0) == TripSize(1, 4)
    assert size_of(room_for_four, 4, 2, pass_tokens=100.0) == TripSize(4, 1)
    room_for_all = 1000 + 4 * MEMORY.row_bytes(2, 4, 4)
    assert size_of(room_for_all, 4, 2, pass_tokens=100.0) == TripSize(4, 4)


@given(
    st.integers(0, 10_000),
    st.lists(st.builds(Growth, st.floats(0, 1e4), st.floats(0, 100)), max_size=4),
    st.integers(1, 1000),
    st.builds(Growth, st.floats(0, 1e4), st.floats(0, 100)),
    st.integers(0, 10_000),
    st.integers(0, 1 << 26),
    st.integers(1, 300),
    st.integers(1, 600),
    st.integers(1, 40),
    st.floats(0, 2000),
)
@settings(deadline=None)
def test_rows_and_notes_fit_and_none_that_fit_cost_less(
    fixed_bytes: int,
    moments: list[Growth],
    state_bytes: int,
    notes: Growth,
    fixed_notes_bytes: int,
    limit_bytes: int,
    num_rows: int,
    num_tokens: int,
    num_blocks: int,
    pass_tokens: float,
) -> None:
    memory = BackwardMemory(fixed_bytes, tuple(moments), state_bytes, notes, fixed_notes_bytes)
    rows = AskedRows(num_rows, num_tokens, Span(0, num_blocks), None)

    def taken_bytes(size: TripSize) -> int:
        of_rows = size.max_rows * memory.row_bytes(num_tokens, num_blocks, size.num_noted)
        return fixed_bytes + (size.num_noted - 1) * fixed_notes_bytes + of_rows

    def cost(size: TripSize) -> float:
        trips = -(-num_rows // size.max_rows)
        return num_stages(num_blocks, size.num_noted) * (trips * pass_tokens + num_rows * num_tokens)

    try:
        size = trip_size(memory, with_gaps(limit_bytes), rows, max_length=600, pass_tokens=pass_tokens)
    except BadRequest as error:
        assert taken_bytes(TripSize(1, 1)) > limit_bytes
        fitting = int(str(error).rpartition("up to ")[2].split()[0])
        assert fitting < num_tokens
        assert fitting == 0 or fixed_bytes + memory.row_bytes(fitting, num_blocks) <= limit_bytes
        assert fixed_bytes + memory.row_bytes(fitting + 1, num_blocks) > limit_bytes
        return
    assert size.max_rows >= 1
    assert 1 <= size.num_noted <= num_blocks
    assert taken_bytes(size) <= limit_bytes
    others = (TripSize(number, noted) for number in range(1, num_rows + 1) for noted in range(1, num_blocks + 1))
    assert all(cost(other) >= cost(size) for other in others if taken_bytes(other) <= limit_bytes)


def test_what_low_rank_pairs_note_is_that_of_the_block_with_most_of_them() -> None:
    def layer(block: int, path: str, rank: int, inputs: int, outputs: int) -> TunedLayer:
        return TunedLayer(
            block, path, encode_tensor(torch.zeros(rank, inputs)), encode_tensor(torch.zeros(outputs, rank))
        )

    tuning = WireTuning(None, (layer(1, "a", 2, 10, 30), layer(1, "b", 4, 20, 5), layer(2, "a", 2, 10, 30)))
    assert tuned_bytes(tuning) == TunedBytes(noted=4 * (10 + 2 + 20 + 4), passing=2 * 4 * (10 + 2 + 30))
