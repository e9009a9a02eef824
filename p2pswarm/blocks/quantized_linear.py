"""Linear layers with quantized weights: on the CPU by our kernel where it runs, by bitsandbytes everywhere else.

Both hold the same numbers. What differs is how states are multiplied by them: bitsandbytes unpacks nf4 weights and
computes in the layer's dtype; the kernel rounds the states to 16 bits first, in blocks of 64. Gradients go back
through both: through the weights that the quantized ones stand for, as if nothing had been rounded.
"""

import importlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from p2pswarm.blocks.quantized_kernel import BLOCK_WEIGHTS, Kernel, find_kernel
from p2pswarm.core.quantization import Quantization

OUTLIER_SIZE = 6.0
"""With int8, bitsandbytes multiplies states larger than this in half precision (the LLM.int8 paper's threshold)."""
RESTORED_WEIGHTS = 1 << 20
"""At once, on the way back: 4 MiB as float32. Measured with 4096 x 2048 nf4 weights on one core of an AMD EPYC, 1024
tokens take 206 ms so, 225 with all at once, and 188 where the weights are float32 to begin with."""


class KernelLinear(nn.Module):
    """A linear layer that takes and returns any float, and whose result for a token depends on that token only."""

    quantized: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, kernel: Kernel, weight: torch.Tensor, bias: torch.Tensor | None, quantization: Quantization
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.quantization = quantization
        self.kernel = kernel
        quantized, scales = kernel.quantize(weight, quantization)
        self.register_buffer("quantized", quantized)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.to(torch.float32))

    @property
    def weight(self) -> torch.Tensor:
        """The weights that the quantized ones stand for: `[outputs, inputs], float32`, made anew each time."""
        return self._restored(0, self.out_features)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if states.requires_grad and torch.is_grad_enabled():
            result: torch.Tensor = _MultiplyWithGradient.apply(states, self)  # type: ignore[no-untyped-call]
            return result
        return self.multiply(states)

    def multiply(self, states: torch.Tensor) -> torch.Tensor:
        """As `forward`, and nothing of it is noted for a gradient."""
        rows = states.to(torch.float32).contiguous()
        results = self.kernel.multiply(rows, self.quantized, self.scales, self.bias, self.quantization)
        return results.to(states.dtype)

    def multiply_back(self, grads: torch.Tensor) -> torch.Tensor:
        """The gradients of the states, where `grads` are those of the result; in the same dtype."""
        rows = grads.reshape(-1, self.out_features).to(torch.float32)
        total = torch.zeros(len(rows), self.in_features)
        step = max(1, RESTORED_WEIGHTS // self.in_features)
        for start in range(0, self.out_features, step):
            end = min(start + step, self.out_features)
            total.addmm_(rows[:, start:end], self._restored(start, end))
        return total.to(grads.dtype).view(*grads.shape[:-1], self.in_features)

    def _restored(self, start: int, end: int) -> torch.Tensor:
        """The weights of the outputs `[start, end)`, `[end - start, inputs], float32`."""
        quantized, scales = self.quantized[start:end], self.scales[start:end]
        if self.quantization is Quantization.INT8:
            return quantized * (scales / 127).unsqueeze(1)
        values = F.embedding(quantized.int(), self.kernel.nf4_pairs).view(end - start, -1, BLOCK_WEIGHTS)
        return values.mul_(scales.unsqueeze(2)).view(end - start, self.in_features)


class _MultiplyWithGradient(torch.autograd.Function):
    """A `KernelLinear` that gradients go back through. Nothing is kept for them: the weights never change."""

    @staticmethod
    def forward(context: Any, states: torch.Tensor, layer: KernelLinear) -> torch.Tensor:
        context.layer = layer
        return layer.multiply(states)

    @staticmethod
    def backward(context: Any, grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return context.layer.multiply_back(grads), None


def quantized_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, quantization: Quantization, dtype: torch.dtype
) -> nn.Module:
    """A layer that computes `states @ weight.T + bias` with the weight quantized, on the device of the weight.

    `weight: [outputs, inputs], any float`; `dtype` is that of the states.
    """
    if weight.device.type == "cpu":
        kernel = find_kernel()
        if isinstance(kernel, Kernel):
            return KernelLinear(kernel, weight, bias, quantization)
    return bitsandbytes_linear(weight, bias, quantization, dtype)


def bitsandbytes_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, quantization: Quantization, dtype: torch.dtype
) -> nn.Module:
    """As `quantized_linear`, by bitsandbytes in any case."""
    bitsandbytes: Any = importlib.import_module("bitsandbytes")  # takes 2 s: it brings torch's compiler
    outputs, inputs = weight.shape
    options = {"bias": bias is not None, "device": "meta"}
    layer: Any
    if quantization is Quantization.INT8:
        steps, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16))
        layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False, threshold=OUTLIER_SIZE, **options)
        layer.weight = bitsandbytes.nn.Int8Params(
            steps, requires_grad=False, has_fp16_weights=False, CB=steps, SCB=scales
        )
    else:
        settings = {"compress_statistics": False, "quant_type": "nf4"}
        layer = bitsandbytes.nn.Linear4bit(inputs, outputs, compute_dtype=dtype, **settings, **options)
        packed, state = bitsandbytes.functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK_WEIGHTS, **settings)
        layer.weight = bitsandbytes.nn.Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            blocksize=BLOCK_WEIGHTS,
            bnb_quantized=True,
            module=layer,
            **settings,
        )
        layer.quant_state = state
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    module: nn.Module = layer
    return module
