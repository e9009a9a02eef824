"""Which weights of a block are quantized, what they then take, and where that cannot be done.

Quantized are linear layers, which hold nearly all weights of a block; norms stay as they are. How a quantized layer
computes is in `quantized_linear.py`. Experts of a mixture that are stored as one three-dimensional tensor are no linear
layers (bitsandbytes and transformers leave them as they are too), so such a block is refused rather than served hardly
smaller than before.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from p2pswarm.blocks.architecture import Layout
from p2pswarm.blocks.heap import trim_heap
from p2pswarm.blocks.loading import load_weights
from p2pswarm.blocks.quantized_kernel import BLOCK_WEIGHTS, STATES_PRECISION, NoKernel, find_kernel
from p2pswarm.blocks.quantized_linear import KernelLinear, quantized_linear
from p2pswarm.blocks.stand_ins import PassThrough
from p2pswarm.blocks.weight_source import WeightSource
from p2pswarm.core.errors import ConfigError, UnsupportedModelError
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span

DEVICE_KINDS = ("cuda", "cpu")
MIN_QUANTIZED_SHARE = 0.5
"""Of a block's weights; in plain decoders it is 0.99 and more."""
SCALE_BYTES = 4
LARGEST_SHOWN = 3
"""Tensors in a message."""


def check_quantizable(block: nn.Module, quantization: Quantization, device: torch.device) -> None:
    """Raises `ConfigError` where the device cannot do it, `UnsupportedModelError` where the block is not fit for it."""
    if quantization is Quantization.NONE:
        return
    if device.type not in DEVICE_KINDS:
        raise ConfigError(
            f"quant: {quantization.value} works on CUDA and on the CPU, not on {device.type}: "
            "use --quant none or --device cpu"
        )
    num_weights = sum(parameter.numel() for parameter in block.parameters())
    num_quantized = sum(_weight(layer).numel() for layer in _layers(block).values())
    if num_quantized < MIN_QUANTIZED_SHARE * num_weights:
        raise UnsupportedModelError(
            f"{quantization.value} would quantize only {num_quantized / num_weights:.0%} of the weights of a "
            f"{type(block).__name__}: the rest is not in linear layers of a multiple of {BLOCK_WEIGHTS} inputs "
            f"({_largest_other(block)}); use --quant none"
        )


def weights_bytes(block: nn.Module, quantization: Quantization) -> int:
    """What a block takes in memory once it is quantized; its parameters may be on the meta device."""
    total = sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
    if quantization is not Quantization.NONE:
        weights = [_weight(layer) for layer in _layers(block).values()]
        total += sum(_quantized_bytes(weight, quantization) - weight.nbytes for weight in weights)
    return total


def quantize_block(block: nn.Module, quantization: Quantization, dtype: torch.dtype) -> None:
    """Replaces the linear layers of a block that is loaded, one after the other, on the device they are on.

    `dtype` is what the block computes in. Takes the memory of one layer more for a moment.
    """
    for path, layer in _layers(block).items():
        if _only_multiplies(layer):
            try:
                quantized = quantized_linear(_weight(layer), layer.bias, quantization, dtype)  # type: ignore[arg-type]
            except (ImportError, NotImplementedError, RuntimeError) as error:
                device = _weight(layer).device
                raise ConfigError(
                    f"quant: {quantization.value} failed on {device}: {error}; use --quant none"
                ) from error
            block.set_submodule(path, quantized)
    for parameter in block.parameters():
        # A norm that is still a view of the checkpoint's mapped file would keep all that was read of it in memory.
        parameter.data = parameter.data.clone()


def load_quantized(
    layout: Layout,
    span: Span,
    source: WeightSource,
    quantization: Quantization,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """As `load_weights`, one block after the other, so that no more than one block is there unquantized."""
    blocks = {index: layout.blocks[index] for index in range(span.start, span.end)}
    for index, block in blocks.items():
        layout.blocks[index] = PassThrough(block)
    for index, block in blocks.items():
        passing = layout.blocks[index]
        layout.blocks[index] = block
        load_weights(layout.model, source, dtype=dtype, device=device)
        source.release()
        quantize_block(block, quantization, dtype)
        trim_heap()
        layout.blocks[index] = passing
    for index, block in blocks.items():
        layout.blocks[index] = block


def rounding_of(model: nn.Module, dtype: torch.dtype) -> float:
    """The relative error that one operation of the model may make: its dtype's, or that of its quantized layers."""
    is_rounding = any(isinstance(module, KernelLinear) for module in model.modules())
    return max(torch.finfo(dtype).eps, STATES_PRECISION if is_rounding else 0.0)


def slowness(quantization: Quantization, device: torch.device) -> str | None:
    """What to tell an operator whose server will be slow with quantized weights, and why; None where it will not."""
    if quantization is Quantization.NONE or device.type != "cpu":
        return None
    kernel = find_kernel()
    if not isinstance(kernel, NoKernel):
        return None
    return (
        f"{quantization.value} weights save memory, but are computed by bitsandbytes, several times slower than "
        f"unquantized ones unless this processor has AVX-512: {kernel.reason}"
    )


def _layers(block: nn.Module) -> Mapping[str, nn.Module]:
    """The layers of a block whose weights can be quantized, by their paths."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's name for a linear layer stored the other way round

    return {
        path: module
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _weight(module).shape[1] % BLOCK_WEIGHTS == 0
    }


def _weight(layer: nn.Module) -> torch.Tensor:
    """`[outputs, inputs]`"""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _only_multiplies(layer: nn.Module) -> bool:
    """Whether a layer does what a linear layer does, tried out on numbers where its class may do more (a router)."""
    if not isinstance(layer, nn.Linear) or type(layer) is nn.Linear:
        return True
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 1, layer.in_features, generator=generator).to(layer.weight)
    result = layer(states)
    expected = F.linear(states, layer.weight, layer.bias)
    return isinstance(result, torch.Tensor) and result.shape == expected.shape and torch.allclose(result, expected)


def _quantized_bytes(weight: torch.Tensor, quantization: Quantization) -> int:
    if quantization is Quantization.INT8:
        return weight.numel() + weight.shape[0] * SCALE_BYTES
    return weight.numel() // 2 + weight.numel() // BLOCK_WEIGHTS * SCALE_BYTES


def _largest_other(block: nn.Module) -> str:
    quantized = {f"{path}.weight" for path in _layers(block)}
    others = [(tensor.numel(), name, tensor) for name, tensor in block.named_parameters() if name not in quantized]
    largest = sorted(others, reverse=True, key=lambda other: other[0])[:LARGEST_SHOWN]
    return ", ".join(f"{name} {list(tensor.shape)}" for _, name, tensor in largest)
