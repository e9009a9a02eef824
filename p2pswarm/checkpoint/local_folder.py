"""The files of a model in a local Hugging Face folder, or why they cannot be used."""

import json
from pathlib import Path
from typing import Any

from p2pswarm.checkpoint.safetensors_store import open_safetensors, read_index
from p2pswarm.core.errors import CheckpointError

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
SINGLE_FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")

PICKLE_REFUSAL = (
    "its weights are only there as a pickle ({names}), which runs whatever code it contains when it is loaded; "
    "ask its author for safetensors, or convert it on a machine you can afford to lose: "
    "AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)"
)


def read_config_json(path: Path) -> dict[str, Any]:
    """A raw `config.json`. Raises `CheckpointError`."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is no model folder: it has no {path.name}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a config")
    return config


def weight_files(folder: Path) -> dict[str, str]:
    """Which file of the folder holds which tensor. Raises `CheckpointError` where there is no safetensors file."""
    index = folder / INDEX_NAME
    if index.exists():
        file_of = read_index(index)
        absent = sorted({name for name in file_of.values() if not (folder / name).exists()})
        if absent:
            raise CheckpointError(f"{folder} lacks {', '.join(absent)}, which its {INDEX_NAME} names")
        return file_of
    single = folder / SINGLE_FILE_NAME
    if single.exists():
        return dict.fromkeys(open_safetensors(single).keys(), SINGLE_FILE_NAME)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(f"{folder} is refused: {PICKLE_REFUSAL.format(names=', '.join(pickles))}")
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE_NAME} nor {INDEX_NAME}")
