"""What a client may bring along to blocks of a tiny llama: deep prompts, and low-rank pairs for two layers of each."""

import torch

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.core.span import Span
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.tuning import TunedLayer, WireTuning

HIDDEN_SIZE = 64
PROMPT_TOKENS = 5
LAYERS = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (128, 64)}
"""Inputs and outputs, by path."""


def tuning_of(span: Span, seed: int = 3, rank: int = 3) -> SpanTuning:
    """With nothing for the layers of the last block."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        index: {
            path: LowRank(
                torch.randn(rank, inputs, generator=generator) / 8, torch.randn(outputs, rank, generator=generator) / 8
            )
            for path, (inputs, outputs) in LAYERS.items()
        }
        for index in range(span.start, span.end - 1)
    }
    return SpanTuning(span, torch.randn(span.num_blocks, PROMPT_TOKENS, HIDDEN_SIZE, generator=generator), layers)


def wired(tuning: SpanTuning) -> WireTuning:
    """As it travels."""
    layers = [
        TunedLayer(index, path, encode_tensor(pair.down), encode_tensor(pair.up))
        for index, pairs in sorted(tuning.layers.items())
        for path, pair in sorted(pairs.items())
    ]
    return WireTuning(None if tuning.prompts is None else encode_tensor(tuning.prompts), tuple(layers))
