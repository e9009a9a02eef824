"""How a server holds its weights where the operator has not said so: nf4 on CUDA, as the checkpoint has them elsewhere.

On a GPU, memory is what limits the number of blocks, and nf4 fits three to four times as many; on a CPU there is more
of it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from p2pswarm.blocks.architecture import lay_out
from p2pswarm.blocks.quantization import check_quantizable, slowness
from p2pswarm.core.errors import UnsupportedModelError
from p2pswarm.core.quantization import Quantization

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class QuantizationChoice:
    quantization: Quantization
    warning: str | None = None
    """For the operator, when he does not get what he may expect."""


def choose_quantization(
    wanted: Quantization | None, model: "PretrainedConfig", dtype: torch.dtype, device: torch.device
) -> QuantizationChoice:
    """What was asked for, or the device's default. Raises `ConfigError` or `UnsupportedModelError` where what was asked
    for by name cannot be done.
    """
    quantization = wanted or (Quantization.NF4 if device.type == "cuda" else Quantization.NONE)
    if quantization is Quantization.NONE:
        return QuantizationChoice(quantization)
    try:
        for block in lay_out(model, dtype).blocks:
            check_quantizable(block, quantization, device)
    except UnsupportedModelError as error:
        if wanted is not None:
            raise
        return QuantizationChoice(Quantization.NONE, f"serving unquantized weights: {error}")
    return QuantizationChoice(quantization, slowness(quantization, device))
