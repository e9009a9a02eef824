"""Tensors of safetensors files, each file opened when the first of its tensors is asked for.

Nothing is copied: a tensor read here is a view of the mapped file, and its pages come from disk when they are first
touched. Knows nothing of models; `checkpoint.py` says which files belong to one.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from p2pswarm.core.errors import CheckpointError


class TensorStore(Protocol):
    """Tensors by name, whatever they are stored in."""

    @property
    def tensor_names(self) -> frozenset[str]: ...

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The named tensors as stored, on the CPU, not to be written to. Raises `CheckpointError`."""
        ...

    def release(self) -> None:
        """Holds nothing open any more. Tensors that were read stay valid; more may be read."""
        ...


class SafetensorsStore:
    """Tensors of one or several safetensors files.

    `file_of` says which file holds a tensor, `fetch` where that file is on this machine (and may download it).
    """

    def __init__(self, file_of: Mapping[str, str], fetch: Callable[[str], Path]) -> None:
        self._file_of = dict(file_of)
        self._fetch = fetch
        self._open_files: dict[str, Any] = {}

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        missing = sorted(set(names) - self._file_of.keys())
        if missing:
            raise CheckpointError(f"the checkpoint has no tensors {', '.join(missing)}")
        tensors = {}
        for name in names:
            file_name = self._file_of[name]
            try:
                tensors[name] = self._file(file_name).get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(f"cannot read the tensor {name} from {file_name}: {error}") from error
        return tensors

    def release(self) -> None:
        self._open_files.clear()

    def _file(self, file_name: str) -> Any:
        if file_name not in self._open_files:
            self._open_files[file_name] = open_safetensors(self._fetch(file_name))
        return self._open_files[file_name]


def open_safetensors(path: Path) -> Any:
    """A handle with `keys()` and `get_tensor(name)`. Raises `CheckpointError` when the file is damaged or missing."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def read_index(path: Path) -> dict[str, str]:
    """Which file holds which tensor, from a `model.safetensors.index.json`."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        file_of = {str(name): str(file_name) for name, file_name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files: {error!r}") from error
    for file_name in set(file_of.values()):
        if Path(file_name).name != file_name:
            raise CheckpointError(f"{path} names the file {file_name!r}, which is not beside it")
    return file_of
