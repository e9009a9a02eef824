"""What going back takes in memory: the inputs of all blocks, and the notes of as many as keep them, whatever their
weights are."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from p2pswarm.blocks.quantized_kernel import Kernel, NoKernel, find_kernel
from p2pswarm.blocks.quantized_linear import RESTORED_WEIGHTS, KernelLinear
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from swarmd.working_memory import peak_tensor_bytes

HIDDEN = 64
FLOAT_BYTES = 4
MOST_NOTES = 20
"""How many times what enters a block its notes may be; `span_backward.py` says more."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")
    return load_span(open_checkpoint(str(folder)), Span(0, 8))


def peak_bytes(span: SpanModel, *, rows: int = 2, tokens: int = 128, num_blocks: int = 4, num_noted: int = 1) -> int:
    states, grads = torch.randn(2, rows, tokens, HIDDEN).unbind()
    return peak_tensor_bytes(lambda: span.run_backward(states, grads, blocks=Span(0, num_blocks), num_noted=num_noted))


def test_each_block_more_takes_its_inputs_and_no_more(span: SpanModel) -> None:
    rows, tokens = 3, 100
    peaks = [peak_bytes(span, rows=rows, tokens=tokens, num_blocks=count) for count in range(2, 9)]
    entering = rows * tokens * HIDDEN * FLOAT_BYTES
    assert [after - before for before, after in pairwise(peaks)] == [entering] * 6
    assert peaks[0] < (2 + MOST_NOTES) * entering


def test_each_block_more_that_notes_takes_its_notes_and_no_more(span: SpanModel) -> None:
    rows, tokens = 3, 100
    peaks = [peak_bytes(span, rows=rows, tokens=tokens, num_blocks=8, num_noted=count) for count in range(1, 9)]
    differences = [after - before for before, after in pairwise(peaks)]
    assert len(set(differences[1:])) == 1
    assert 0 < differences[0] <= differences[1] < MOST_NOTES * rows * tokens * HIDDEN * FLOAT_BYTES


def test_a_row_more_takes_what_a_row_takes(span: SpanModel) -> None:
    one, two, three = (peak_bytes(span, rows=rows) for rows in (1, 2, 3))
    assert 0 < three - two <= one
    assert abs((three - two) - (two - one)) < 0.01 * one


def test_twice_the_tokens_take_hardly_more_than_twice_the_memory(span: SpanModel) -> None:
    short, long = (peak_bytes(span, rows=1, tokens=tokens) for tokens in (128, 256))
    assert long < 2.2 * short


@pytest.mark.parametrize("kind", [Quantization.INT8, Quantization.NF4])
def test_quantized_weights_are_restored_a_few_at_a_time(kind: Quantization) -> None:
    kernel = find_kernel()
    if isinstance(kernel, NoKernel):
        pytest.skip(kernel.reason)
    assert isinstance(kernel, Kernel)
    inputs, outputs = 1024, 6 * RESTORED_WEIGHTS // 1024
    layer = KernelLinear(kernel, torch.randn(outputs, inputs), None, kind)
    peak = peak_tensor_bytes(lambda: layer.multiply_back(torch.randn(4, outputs)))
    assert peak < 3 * RESTORED_WEIGHTS * FLOAT_BYTES
    assert layer.weight.nbytes == 6 * RESTORED_WEIGHTS * FLOAT_BYTES


def test_a_quantized_span_takes_no_more_than_an_unquantized_one(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, "llama")))
    plain, quantized = (
        peak_bytes(load_span(checkpoint, Span(0, 4), quantization=kind))
        for kind in (Quantization.NONE, Quantization.NF4)
    )
    assert quantized < 1.1 * plain
