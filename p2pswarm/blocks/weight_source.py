"""What this room needs of a checkpoint: a config and tensors by name. `checkpoint.Checkpoint` is one."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig


class WeightSource(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def config(self) -> "PretrainedConfig": ...

    @property
    def generation_config(self) -> "GenerationConfig | None": ...

    @property
    def tensor_names(self) -> frozenset[str]: ...

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]: ...

    def release(self) -> None:
        """What was read so far is not needed any more, but by those who hold it; more may be read."""
        ...
