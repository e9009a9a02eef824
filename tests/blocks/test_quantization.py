"""Quantized spans compute what the weights of bitsandbytes mean, take the memory they should, refuse what cannot be."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from p2pswarm.blocks import quantization as quantization_module
from p2pswarm.blocks.architecture import lay_out
from p2pswarm.blocks.quantization import check_quantizable, quantize_block, slowness, weights_bytes
from p2pswarm.blocks.quantized_kernel import Kernel, NoKernel, find_kernel
from p2pswarm.blocks.quantized_linear import KernelLinear, bitsandbytes_linear, quantized_linear
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.core.errors import ConfigError, UnsupportedModelError
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, tiny_config

BOTH = (Quantization.INT8, Quantization.NF4)
SPAN = Span(1, 5)
CPU = torch.device("cpu")
ROUNDING_ERROR = 1e-4
"""Of a result, by rounding states to 16 bits (and nf4's sixteen values to 14)."""
QUANTIZATION_ERROR = {Quantization.INT8: 0.04, Quantization.NF4: 0.4}
"""Of a tiny random span's hidden states; measured are up to 0.03 and 0.35."""


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    found = find_kernel()
    if isinstance(found, NoKernel):
        pytest.skip(found.reason)
    return found


@pytest.fixture(scope="module")
def bitsandbytes_is_quiet() -> None:
    """Its import, and the compiler it brings, warn of things that are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes  # noqa: F401


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(save_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")))


def random_weight(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def random_states(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", BOTH)
def test_weights_are_rounded_exactly_as_bitsandbytes_rounds_them(
    kernel: Kernel, bitsandbytes_is_quiet: None, kind: Quantization
) -> None:
    weight = random_weight(70, 192)
    weight[3] = 0  # no scale
    weight[4, 64:128] = 0
    theirs = bitsandbytes_linear(weight, None, kind, torch.float32)
    quantized, scales = kernel.quantize(weight, kind)
    assert torch.equal(quantized.view(-1), theirs.weight.data.view(-1))
    their_scales = theirs.weight.SCB if kind is Quantization.INT8 else theirs.weight.quant_state.absmax
    assert torch.equal(scales.view(-1), their_scales.view(-1))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_quantized_layer_multiplies_by_its_weights(
    kernel: Kernel, kind: Quantization, num_rows: int, has_bias: bool
) -> None:
    bias = random_states(70) if has_bias else None
    layer = KernelLinear(kernel, random_weight(70, 192), bias, kind)
    states = random_states(num_rows, 192)
    assert relative_error(layer.weight, random_weight(70, 192)) < (0.01 if kind is Quantization.INT8 else 0.1)
    assert relative_error(layer(states), F.linear(states, layer.weight, bias)) < ROUNDING_ERROR


@pytest.mark.parametrize("kind", BOTH)
def test_bitsandbytes_and_the_kernel_are_the_same_layer(
    kernel: Kernel, bitsandbytes_is_quiet: None, kind: Quantization
) -> None:
    weight, bias, states = random_weight(70, 192), random_states(70), random_states(2, 3, 192)
    ours = quantized_linear(weight, bias, kind, torch.float32)(states)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it computes int8 in float16
        theirs = bitsandbytes_linear(weight, bias, kind, torch.float32)(states)
    assert ours.shape == theirs.shape == (2, 3, 70)
    # With int8, bitsandbytes rounds the states to 8 bits.
    assert relative_error(ours, theirs) < (0.02 if kind is Quantization.INT8 else ROUNDING_ERROR)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(BOTH), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_a_rows_result_is_bit_for_bit_the_same_in_any_company(
    kind: Quantization, sizes: Sequence[int], seed: int
) -> None:
    kernel = find_kernel()
    if isinstance(kernel, NoKernel):
        pytest.skip(kernel.reason)
    layer = KernelLinear(kernel, random_weight(33, 128, seed), None, kind)
    states = 10 * random_states(sum(sizes), 128, seed=seed)
    together = layer(states)
    assert torch.equal(together, torch.cat([layer(part) for part in states.split(list(sizes))]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(together, layer(states))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_states_that_are_no_numbers_stay_visible(kernel: Kernel, kind: Quantization, bad: float) -> None:
    states = random_states(3, 128)
    states[1, 77] = bad
    finite = KernelLinear(kernel, random_weight(10, 128), None, kind)(states).isfinite()
    assert finite.all(dim=1).tolist() == [True, False, True]
    assert not finite[1].any()


@pytest.mark.parametrize("kind", BOTH)
def test_a_large_state_does_not_drown_those_far_from_it(kernel: Kernel, kind: Quantization) -> None:
    layer = KernelLinear(kernel, random_weight(40, 256), None, kind)
    states = random_states(1, 256)
    spiked = states.clone()
    spiked[0, 200] = 1000.0
    difference = layer(spiked) - layer(states)
    expected = (spiked - states) @ layer.weight.T
    assert relative_error(difference, expected) < 3e-4


@pytest.mark.parametrize("kind", BOTH)
def test_gradients_go_through_a_quantized_layer(kernel: Kernel, kind: Quantization) -> None:
    layer = KernelLinear(kernel, random_weight(40, 128), None, kind)
    states = random_states(2, 128).requires_grad_()
    layer(states).sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad, layer.weight.sum(0).expand(2, -1))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_come_back_in_the_dtype_they_came_in(kernel: Kernel, kind: Quantization, dtype: torch.dtype) -> None:
    layer = KernelLinear(kernel, random_weight(40, 128), random_states(40), kind)
    states = random_states(2, 128).to(dtype)
    assert layer(states).dtype == dtype
    assert torch.equal(layer(states), layer(states.float()).to(dtype))


def hidden_states_of(model: SpanModel, num_tokens: int = 6) -> torch.Tensor:
    return random_states(1, num_tokens, model.hidden_size)


def decoded(model: SpanModel, states: torch.Tensor) -> torch.Tensor:
    cache = model.new_cache(1)
    steps = [model.run(states[:, at : at + 1], cache, position=at) for at in range(states.shape[1])]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("model_type", ["llama", "falcon", "gpt2"])
def test_a_quantized_span_computes_nearly_what_it_did(model_type: str, kind: Quantization, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, model_type)))
    exact, quantized = load_span(checkpoint, SPAN), load_span(checkpoint, SPAN, quantization=kind)
    states = hidden_states_of(exact)
    result = quantized.run(states, None, position=0)
    assert 1e-4 < relative_error(result, exact.run(states, None, position=0)) < QUANTIZATION_ERROR[kind]
    torch.testing.assert_close(decoded(quantized, states), result, atol=1e-3, rtol=1e-3)
    assert quantized.can_batch == exact.can_batch


@pytest.mark.parametrize("kind", BOTH)
def test_without_the_kernel_bitsandbytes_serves_the_same_span(
    llama: Checkpoint, kind: Quantization, bitsandbytes_is_quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load_span(llama, SPAN, quantization=kind)
    monkeypatch.setattr(
        quantization_module,
        "quantized_linear",
        lambda weight, bias, kind, dtype: bitsandbytes_linear(weight, bias, kind, dtype),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = load_span(llama, SPAN, quantization=kind)
        states = hidden_states_of(ours)
        expected = decoded(theirs, states)
    assert relative_error(decoded(ours, states), expected) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("kind", BOTH)
def test_a_gpu_and_a_processor_serve_the_same_span(llama: Checkpoint, kind: Quantization) -> None:
    on_processor = load_span(llama, SPAN, quantization=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_gpu = load_span(llama, SPAN, device="cuda", quantization=kind)
        states = hidden_states_of(on_processor)
        got = decoded(on_gpu, states.to("cuda"))
    assert relative_error(got.cpu(), decoded(on_processor, states)) < 0.05


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_in_one_tensor_are_refused_with_what_is_in_the_way(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, model_type)))
    with pytest.raises(UnsupportedModelError, match=r"nf4 .* only \d+% .*mlp.experts.gate_up_proj .* --quant none"):
        load_span(checkpoint, SPAN, quantization=Quantization.NF4)


def test_other_devices_are_refused(llama: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="int8 works on CUDA and on the CPU, not on mps: use --quant none"):
        load_span(llama, SPAN, device="mps", quantization=Quantization.INT8)


@pytest.mark.parametrize("kind", Quantization)
def test_the_memory_of_a_block_is_known_before_it_is_loaded(llama: Checkpoint, kind: Quantization) -> None:
    told = weights_bytes(lay_out(llama.config, torch.float32).blocks[0], kind)
    assert told == weights_bytes(lay_out(tiny_config("llama"), torch.float32).blocks[0], kind)
    model = load_span(llama, Span(0, 1), quantization=kind)
    block = model._blocks[0]
    assert sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers())) == told


def test_layers_that_do_more_than_multiply_stay_as_they_are() -> None:
    class Router(nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states).softmax(-1)

    block = nn.Module()
    block.router, block.plain = Router(64, 8), nn.Linear(64, 64)
    block.odd = nn.Linear(63, 8)
    quantize_block(block, Quantization.NF4, torch.float32)
    assert type(block.router) is Router
    assert type(block.odd) is nn.Linear
    assert type(block.plain) is not nn.Linear


def test_unquantized_blocks_are_not_looked_at() -> None:
    check_quantizable(nn.Linear(3, 3), Quantization.NONE, torch.device("mps"))
    assert slowness(Quantization.NONE, CPU) is None


def test_the_operator_hears_why_quantized_weights_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization_module, "find_kernel", lambda: NoKernel("there is no C compiler"))
    warning = slowness(Quantization.NF4, CPU)
    assert warning is not None
    assert "several times slower" in warning
    assert warning.endswith("there is no C compiler")
    assert slowness(Quantization.NF4, torch.device("cuda")) is None
