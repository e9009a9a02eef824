"""A tuned model's folder: what was trained and nothing else, as peft writes and reads it.

`adapter_model.safetensors` and `adapter_config.json` are the adapter. `model.safetensors` holds the same parameters by
the names that they have in this model, which is where transformers' `Trainer` looks for them when it resumes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from p2pswarm.checkpoint.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from p2pswarm.checkpoint.local_folder import SINGLE_FILE_NAME


def save_adapter(
    folder: Path,
    adapter_config: Mapping[str, Any],
    adapter_tensors: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Each file is whole at any time: a new one takes the place of the old when it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(folder / WEIGHTS_NAME, adapter_tensors, metadata)
    _save_tensors(folder / SINGLE_FILE_NAME, parameters, metadata)
    unfinished = folder / f".{CONFIG_NAME}"
    unfinished.write_text(json.dumps(adapter_config, indent=2, sort_keys=True))
    os.replace(unfinished, folder / CONFIG_NAME)


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    unfinished = path.with_name(f".{path.name}")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, unfinished, metadata={"format": "pt", **metadata})
    os.replace(unfinished, path)
