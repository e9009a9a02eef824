"""What gradients take is what they are said to take, and never more than there is for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tunings import wired

from p2pswarm.blocks.adapters import LowRank, linear_size
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.errors import BadRequest
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.tuning import TunedLayer, WireTuning
from swarmd.rows_back import Rows, RowsBack, num_stages
from swarmd.training_memory import BackwardMemory, Growth, most_rows, tuned_token_bytes
from swarmd.working_memory import backward_history, backward_memory, tensor_bytes

MIB = 1 << 20
SPAN = Span(2, 6)
MEMORY = BackwardMemory(1000, (Growth(100.0, 1.0), Growth(200.0, 0.5)), state_bytes=10)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "falcon", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_row_of_any_length_takes_is_known_from_short_ones(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path / "tiny", model_type)))
    model = load_span(checkpoint, Span(0, 2), dtype=dtype)
    memory = backward_memory(model)
    for num_tokens in (3, 50, 250):
        measured_bytes = max(backward_history(model, num_tokens))
        said_bytes = memory.fixed_bytes + memory.row_bytes(num_tokens, num_blocks=0)
        assert measured_bytes <= 1.001 * said_bytes
        assert said_bytes <= 1.05 * measured_bytes + 2048


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
def test_rows_under_way_keep_to_their_memory(tiny_span: SpanModel, rank: int | None, num_tokens: int) -> None:
    memory, limit_bytes = backward_memory(tiny_span), 3 * MIB
    tuning = None if rank is None else tiny_span.fit_tuning(full_tuning(tiny_span, rank))
    wire = None if tuning is None else wired(tuning)
    num_rows = most_rows(memory, limit_bytes, num_tokens, tiny_span.span, wire, max_length=64)
    mask = torch.ones(num_rows, num_tokens, dtype=torch.bool)
    mask[:, : num_tokens // 2] = False

    def there_and_back() -> None:
        states, gradients = torch.zeros(2, num_rows, num_tokens, tiny_span.hidden_size)
        rows = RowsBack(tiny_span, SPAN, Rows(states, gradients, mask, None, None, tuning))
        rows.go_on(num_stages(SPAN))
        assert rows.is_done

    tuning_bytes = 0 if tuning is None else tuning.num_bytes
    taken_bytes = max(tensor_bytes(there_and_back))
    assert taken_bytes <= limit_bytes + tuning_bytes
    assert taken_bytes >= 0.3 * limit_bytes


def test_a_row_that_does_not_fit_is_refused_with_how_many_tokens_do() -> None:
    def rows_of(num_tokens: int, **more: Any) -> int:
        return most_rows(MEMORY, 21_000, num_tokens, Span(3, 5), None, **{"max_length": 500, **more})

    assert rows_of(10) == 20_000 // (10 * (200 + 5 + 20))
    assert rows_of(77) == 1
    with pytest.raises(
        BadRequest,
        match=r"gradients of a row of 90 tokens through blocks 3:5 take 24 KiB, and this server has 21 KiB for them "
        r"\(--training-memory\): rows of up to 77 tokens fit",
    ):
        rows_of(90)
    with pytest.raises(BadRequest, match="rows of up to 0 tokens fit"):
        most_rows(MEMORY, 1000, 1, Span(3, 5), None, max_length=500)


@given(
    st.integers(0, 10_000),
    st.lists(st.builds(Growth, st.floats(0, 1e4), st.floats(0, 100)), max_size=4),
    st.integers(1, 1000),
    st.integers(0, 1 << 26),
    st.integers(1, 600),
    st.integers(1, 40),
)
@settings(deadline=None)
def test_no_more_rows_than_fit_and_no_fewer(
    fixed_bytes: int, moments: list[Growth], state_bytes: int, limit_bytes: int, num_tokens: int, num_blocks: int
) -> None:
    memory = BackwardMemory(fixed_bytes, tuple(moments), state_bytes)
    row_bytes = memory.row_bytes(num_tokens, num_blocks)
    try:
        num_rows = most_rows(memory, limit_bytes, num_tokens, Span(0, num_blocks), None, max_length=600)
    except BadRequest as error:
        assert fixed_bytes + row_bytes > limit_bytes
        fitting = int(str(error).rpartition("up to ")[2].split()[0])
        assert fitting < num_tokens
        assert fitting == 0 or fixed_bytes + memory.row_bytes(fitting, num_blocks) <= limit_bytes
        assert fixed_bytes + memory.row_bytes(fitting + 1, num_blocks) > limit_bytes
        return
    assert num_rows >= 1
    if row_bytes:
        assert fixed_bytes + num_rows * row_bytes <= limit_bytes < fixed_bytes + (num_rows + 1) * row_bytes


def test_what_low_rank_pairs_keep_is_that_of_the_block_with_most_of_them() -> None:
    def layer(block: int, path: str, rank: int, inputs: int, outputs: int) -> TunedLayer:
        return TunedLayer(
            block, path, encode_tensor(torch.zeros(rank, inputs)), encode_tensor(torch.zeros(outputs, rank))
        )

    tuning = WireTuning(None, (layer(1, "a", 2, 10, 30), layer(1, "b", 4, 20, 5), layer(2, "a", 2, 10, 30)))
    assert tuned_token_bytes(tuning) == 4 * (10 + 2 + 20 + 4) + 2 * 4 * (10 + 2 + 30)
