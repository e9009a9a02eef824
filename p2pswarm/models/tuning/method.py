"""`TuningMethod`: parameters that are trained on the client while the model's own stay frozen, wherever they are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from p2pswarm.client.carried import Carried
from p2pswarm.client.tuning import Tuning


class TuningMethod(nn.Module, ABC):
    """A submodule of the model that it tunes; its parameters are in float32."""

    def __init__(self, adapter_config: Mapping[str, Any]) -> None:
        """`adapter_config`: what goes into the file of that name."""
        super().__init__()
        self.adapter_config = dict(adapter_config)

    @property
    def kind(self) -> str:
        """peft's type of it, or ours."""
        return str(self.adapter_config["peft_type"])

    def prefix(self) -> torch.Tensor | None:
        """[virtual tokens, embedding size]: in front of each text. Differentiable, as all that is given here."""
        return None

    def tuning(self) -> Tuning | None:
        """What the blocks take along."""
        return None

    def carried(self) -> Carried:
        return Carried(self.prefix(), self.tuning())

    @abstractmethod
    def saved_tensors(self, blocks_path: str) -> dict[str, torch.Tensor]:
        """As an adapter's file names them; `blocks_path`: where the model has its blocks."""

    def is_like(self, other: "TuningMethod") -> bool:
        """Whether the parameters of one can take the place of the other's."""
        sizes = [{name: tensor.shape for name, tensor in method.state_dict().items()} for method in (self, other)]
        return self.adapter_config == other.adapter_config and sizes[0] == sizes[1]
