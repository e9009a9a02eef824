"""What the blocks of a model take in memory, found out before any of them is loaded: `sizing.BlockNeeds`.

Weights are counted exactly, from the model's layout; the rest is measured on one block without weights of its own.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from p2pswarm.blocks.architecture import Layout, lay_out
from p2pswarm.blocks.blank_span import blank_span
from p2pswarm.blocks.quantization import weights_bytes
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from swarmd.scheduling.costs import MAX_PART_TOKENS
from swarmd.sizing import BlockNeeds
from swarmd.working_memory import backward_memory, working_memory_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def measure_needs(config: "PretrainedConfig", dtype: torch.dtype, quantization: Quantization) -> BlockNeeds:
    """What blocks of such a model take, computed in `dtype`. Raises `UnsupportedModelError`."""
    if dtype is torch.float16:
        dtype = torch.bfloat16  # as large, and every CPU computes in it
    layout = lay_out(config, dtype)
    block_bytes = _weights_bytes(layout, quantization)
    heaviest = max(range(len(block_bytes)), key=lambda index: block_bytes[index])
    num_weights = sum(parameter.numel() for parameter in layout.blocks[heaviest].parameters())
    block = blank_span(layout, Span(heaviest, heaviest + 1), dtype=dtype)
    working_bytes = working_memory_bytes(block, num_weights, MAX_PART_TOKENS)
    backward = backward_memory(block)
    if quantization is not Quantization.NONE:
        whole_bytes = num_weights * dtype.itemsize  # one block as it was: while it is quantized, or for its gradients
        working_bytes += whole_bytes
        backward = replace(backward, fixed_bytes=backward.fixed_bytes + whole_bytes)
    return BlockNeeds(block_bytes, block.cache_bytes_per_token, working_bytes, backward)


def block_weights_bytes(config: "PretrainedConfig", dtype: torch.dtype, quantization: Quantization) -> tuple[int, ...]:
    """What the weights of each block take. Raises `UnsupportedModelError`."""
    return _weights_bytes(lay_out(config, dtype), quantization)


def _weights_bytes(layout: Layout, quantization: Quantization) -> tuple[int, ...]:
    return tuple(weights_bytes(block, quantization) for block in layout.blocks)
