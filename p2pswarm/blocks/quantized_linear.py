"""Linear layers with quantized weights: on the CPU by our kernel where it runs, by bitsandbytes everywhere else.

Both hold the same numbers. What differs is how states are multiplied by them: bitsandbytes unpacks nf4 weights and
computes in the layer's dtype; the kernel rounds the states to 16 bits first, in blocks of 64.
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
        if self.quantization is Quantization.INT8:
            return self.quantized * (self.scales / 127).unsqueeze(1)
        codes = torch.stack((self.quantized >> 4, self.quantized & 15), dim=-1)
        values = self.kernel.nf4_values[codes.view(-1, BLOCK_WEIGHTS).long()]
        return (values * self.scales.view(-1, 1)).view(self.out_features, self.in_features)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if states.requires_grad and torch.is_grad_enabled():
            bias = None if self.bias is None else self.bias.to(states.dtype)
            return F.linear(states, self.weight.to(states.dtype), bias)
        rows = states.to(torch.float32).contiguous()
        results = self.kernel.multiply(rows, self.quantized, self.scales, self.bias, self.quantization)
        return results.to(states.dtype)


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
