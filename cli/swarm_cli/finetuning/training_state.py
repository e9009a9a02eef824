"""What a training needs to go on as if it had never stopped: one small file, whole at any time.

It holds the trained parameters and Adam's memory of their gradients as safetensors, and in its metadata the number of
steps taken and the options. Rows and learning rates follow from these.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from p2pswarm.core.errors import CheckpointError

FILE_NAME = "training_state.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class TrainingState:
    """After a step."""

    step: int
    """Steps that were taken."""
    options: Mapping[str, Any]
    parameters: Mapping[str, torch.Tensor]
    memory: Mapping[str, Mapping[str, torch.Tensor]]
    """The optimizer's, by parameter: `exp_avg` and so on. Empty before the first step."""

    def save(self, folder: Path) -> None:
        """Takes the place of what was saved before, in one step."""
        tensors = {f"parameter/{name}": tensor for name, tensor in self.parameters.items()}
        for name, memory in self.memory.items():
            tensors |= {f"{key}/{name}": tensor for key, tensor in memory.items()}
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        metadata = {"step": str(self.step), "options": json.dumps(self.options)}
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{FILE_NAME}.{os.getpid()}"
        save_file(copies, unfinished, metadata)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(folder / FILE_NAME)


def read_state(folder: Path) -> TrainingState | None:
    """What was saved there last; None where nothing was. Raises `CheckpointError` for a damaged file."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        file: Any
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        parameters: dict[str, torch.Tensor] = {}
        memory: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            key, _, parameter = name.partition("/")
            if key == "parameter":
                parameters[parameter] = tensor
            else:
                memory.setdefault(parameter, {})[key] = tensor
        return TrainingState(int(metadata["step"]), json.loads(metadata["options"]), parameters, memory)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove it to begin anew") from error
