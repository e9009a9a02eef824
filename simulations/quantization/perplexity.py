"""How well a model foretells a text, its blocks held as a server holds them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch.nn import functional as F

from p2pswarm.blocks import quantized_linear
from p2pswarm.blocks.client_model import load_client_model
from p2pswarm.blocks.quantized_kernel import NoKernel
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from p2pswarm.testing.exactness import SpanChain

WINDOW_TOKENS = 1024
"""Each window is read by itself; its first token is not foretold."""


@dataclass(frozen=True, slots=True)
class Quality:
    quantization: Quantization
    by_bitsandbytes: bool
    perplexity: float


def load_blocks(checkpoint: Checkpoint, quantization: Quantization, *, by_bitsandbytes: bool) -> SpanModel:
    """All blocks of the model, with quantized layers computed by us where we can, or by bitsandbytes in any case."""
    span = Span(0, checkpoint.num_blocks)
    if not by_bitsandbytes:
        return load_span(checkpoint, span, quantization=quantization)
    with mock.patch.object(quantized_linear, "find_kernel", return_value=NoKernel("not wanted")):
        return load_span(checkpoint, span, quantization=quantization)


@torch.inference_mode()
def perplexity(checkpoint: Checkpoint, blocks: SpanModel, token_ids: Sequence[int]) -> float:
    """The exponential of the mean negative log likelihood of a token."""
    model = load_client_model(checkpoint, SpanChain([blocks]))
    total, count = 0.0, 0
    for begin in range(0, len(token_ids) - 1, WINDOW_TOKENS):
        window = torch.tensor([token_ids[begin : begin + WINDOW_TOKENS]])
        logits = model(window, use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    return math.exp(total / count)
