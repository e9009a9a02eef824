"""What blocks are said to take before they are loaded is what they take then."""

from pathlib import Path

import pytest
import torch
from torch import nn

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from swarmd.block_memory import block_weights_bytes, measure_needs
from swarmd.working_memory import backward_memory, peak_tensor_bytes

FLOAT_BYTES = 4
CACHE_LINE_BYTES = 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_cache_are_those_of_the_loaded_span(tiny_checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    needs = measure_needs(tiny_checkpoint.config, dtype, Quantization.NONE)
    model = load_span(tiny_checkpoint, Span(2, 5), dtype=dtype)
    tensors = [tensor for block in model._blocks.values() for tensor in (*block.parameters(), *block.buffers())]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    num_inputs = sum(tensor.shape[1] for tensor in tensors if tensor.ndim == 2)
    assert sum(needs.weights_bytes[2:5]) == sum(tensor.nbytes for tensor in tensors)
    assert (
        0 <= sum(held.values()) - sum(needs.weights_bytes[2:5]) < 2 * CACHE_LINE_BYTES * num_inputs
    )  # between columns
    assert needs.num_blocks == 8
    assert needs.kv_bytes_per_token * 3 == model.cache_bytes_per_token
    assert needs.weights_bytes == block_weights_bytes(tiny_checkpoint.config, dtype, Quantization.NONE)


def test_float16_for_a_gpu_is_measured_on_a_cpu_without_it(tiny_checkpoint: Checkpoint) -> None:
    half, brain = (
        measure_needs(tiny_checkpoint.config, dtype, Quantization.NONE) for dtype in (torch.float16, torch.bfloat16)
    )
    assert half == brain


def test_quantized_blocks_take_less_and_one_as_it_was_for_a_moment(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path / "tiny", "llama")))
    plain, nf4 = (
        measure_needs(checkpoint.config, torch.float32, quantization)
        for quantization in (Quantization.NONE, Quantization.NF4)
    )
    assert sum(nf4.weights_bytes) < sum(plain.weights_bytes) / 4
    assert nf4.working_bytes == pytest.approx(plain.working_bytes + plain.weights_bytes[0], rel=0.01)


def test_memory_to_work_in_is_that_of_a_long_pass(tiny_checkpoint: Checkpoint) -> None:
    working_bytes = measure_needs(tiny_checkpoint.config, torch.float32, Quantization.NONE).working_bytes
    model = load_span(tiny_checkpoint, Span(0, 1))
    states = torch.zeros(1, 2048, model.hidden_size)
    measured_bytes = peak_tensor_bytes(lambda: model.run(states, None, position=0))
    assert working_bytes == pytest.approx(measured_bytes, rel=0.1)


def test_blocks_that_differ_are_counted_one_by_one(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path / "tiny", "deepseek_v3")))
    dense, *experts = block_weights_bytes(checkpoint.config, torch.float32, Quantization.NONE)
    assert dense < min(experts)


def test_only_what_lives_at_the_same_time_counts() -> None:
    values = torch.zeros(1000)

    def work() -> None:
        doubled = values * 2
        tripled = values * 3
        del doubled
        views = [tripled[start:] for start in range(10)]
        views[0] + tripled

    assert peak_tensor_bytes(work) == 2 * 1000 * FLOAT_BYTES


def test_what_was_there_before_does_not_count() -> None:
    layer = nn.Linear(100, 10)
    states = torch.zeros(7, 100)
    assert peak_tensor_bytes(lambda: layer(states)) == 7 * 10 * FLOAT_BYTES


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.NF4])
def test_gradients_take_what_is_reserved_for_them(tiny_checkpoint: Checkpoint, quantization: Quantization) -> None:
    needs = measure_needs(tiny_checkpoint.config, torch.float32, quantization)
    served = backward_memory(load_span(tiny_checkpoint, Span(2, 5), quantization=quantization))
    assert served.default_bytes(3) <= needs.backward.default_bytes(3)
    assert needs.backward.default_bytes(3) <= 1.2 * served.default_bytes(3)
