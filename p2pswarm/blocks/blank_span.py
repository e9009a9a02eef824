"""A span with zeros for weights: as large and as slow as the real one, and nothing of the checkpoint is read for it.

It shows what a block will take before any is loaded.
"""

import torch
from torch import nn

from p2pswarm.blocks.architecture import Layout
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.blocks.stand_ins import BlockList, PassThrough, empty_outside
from p2pswarm.core.span import Span


def blank_span(layout: Layout, span: Span, *, dtype: torch.dtype) -> SpanModel:
    """Blocks `span` of the layout, which is taken over, on the CPU. Raises `UnsupportedModelError`."""
    for index, layer in enumerate(layout.blocks):
        if not span.covers(index):
            layout.blocks[index] = PassThrough(layer)
    layout.model.set_submodule(layout.blocks_path, BlockList(layout.blocks))
    empty_outside(layout.model, layout.blocks_path)
    for module in layout.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    return SpanModel(layout, span, dtype=dtype, device=torch.device("cpu"))
