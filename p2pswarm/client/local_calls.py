"""Rows through blocks that the client keeps, or their gradients back: what `hop_calls.py` is for servers.

Raises `ConfigError` for a tuning that does not fit the blocks.
"""

import torch

from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.client.hop_calls import CallTerms
from p2pswarm.client.local_blocks import LocalPart
from p2pswarm.client.tuning import as_travels
from p2pswarm.wire.codecs import decode_tensor
from p2pswarm.wire.messages import WireTensor
from p2pswarm.wire.tuning import WireTuning


async def forward_here(part: LocalPart, hidden_states: torch.Tensor, terms: CallTerms) -> torch.Tensor:
    """`hidden_states` [rows, tokens, hidden] after the blocks."""

    def run() -> torch.Tensor:
        output = part.model.run(
            hidden_states,
            None,
            position=0,
            attention_mask=_decoded(terms.attention_mask),
            position_ids=_decoded(terms.position_ids),
            blocks=part.span,
            tuning=_fitted(part, terms),
        )
        return output.to(hidden_states.dtype, copy=True)  # not of inference mode

    return await part.run(run)


async def backward_here(
    part: LocalPart, hidden_states: torch.Tensor, grad_outputs: torch.Tensor, terms: CallTerms
) -> tuple[torch.Tensor, WireTuning | None]:
    """The loss's gradient for what entered the blocks, and for their tuning, by that for what came out.

    Raises `UnsupportedModelError` where none come back through this model.
    """

    def run() -> tuple[torch.Tensor, WireTuning | None]:
        gradients = part.model.run_backward(
            hidden_states,
            grad_outputs,
            attention_mask=_decoded(terms.attention_mask),
            position_ids=_decoded(terms.position_ids),
            blocks=part.span,
            tuning=_fitted(part, terms),
        )
        tuning = None if gradients.tuning is None else as_travels(gradients.tuning)
        return gradients.inputs.to(grad_outputs.dtype), tuning

    return await part.run(run)


def _fitted(part: LocalPart, terms: CallTerms) -> SpanTuning | None:
    tuning = None if terms.tuning is None else terms.tuning.of_blocks(part.span)
    return None if tuning is None else part.model.fit_tuning(tuning)


def _decoded(wire: WireTensor | None) -> torch.Tensor | None:
    return None if wire is None else decode_tensor(wire)
