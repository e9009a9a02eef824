"""Tunings as they travel <-> tunings as the blocks take them, found fit or refused. Imports torch."""

import torch

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.core.errors import BadRequest, ConfigError
from p2pswarm.core.span import Span
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.tensors import WireTensor
from p2pswarm.wire.tuning import TunedLayer, WireTuning
from swarmd.training_memory import FLOAT_BYTES


def held_bytes(wire: WireTuning | None) -> int:
    """What it takes in memory as the blocks take it, in float32."""
    return 0 if wire is None else FLOAT_BYTES * wire.num_elements


def read_tuning(wire: WireTuning | None, span: Span, model: SpanModel) -> SpanTuning | None:
    """What came for these blocks, on the device. Raises `BadRequest`."""
    if wire is None:
        return None
    layers: dict[int, dict[str, LowRank]] = {}
    for layer in wire.layers:
        pair = LowRank(decode_tensor(layer.down), decode_tensor(layer.up))
        layers.setdefault(layer.block, {})[layer.path] = pair
    prompts = None if wire.prompts is None else decode_tensor(wire.prompts)
    try:
        return model.fit_tuning(SpanTuning(span, prompts, layers))
    except ConfigError as error:
        raise BadRequest(str(error)) from error


def write_gradients(gradients: SpanTuning, wire: WireTuning) -> WireTuning:
    """The gradients of the tuning that came as `wire`, in the same order, shapes and dtype."""
    layers = []
    for layer in wire.layers:
        pair = gradients.layers[layer.block][layer.path]
        down, up = _as_sent(pair.down, layer.down), _as_sent(pair.up, layer.up)
        layers.append(TunedLayer(layer.block, layer.path, down, up))
    prompts = None
    if wire.prompts is not None:
        assert gradients.prompts is not None
        prompts = _as_sent(gradients.prompts, wire.prompts)
    return WireTuning(prompts, tuple(layers))


def _as_sent(gradient: torch.Tensor, sent: WireTensor) -> WireTensor:
    return encode_tensor(gradient.to("cpu", getattr(torch, sent.dtype)))
