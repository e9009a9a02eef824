"""A LoRA adapter as peft saves it, in a folder or on the hub: its config, its tensors by name, and the id that all
peers give it.

Only safetensors are read; a pickle is refused. What the tensors do to a model is not known here: `blocks/adapters.py`
makes sense of them.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from p2pswarm.checkpoint.adapter_place import AdapterPlace
from p2pswarm.checkpoint.fingerprint import file_sha256, fingerprint
from p2pswarm.checkpoint.hub import HubModel
from p2pswarm.checkpoint.local_folder import PICKLE_SUFFIXES, read_config_json
from p2pswarm.checkpoint.progress import ProgressListener
from p2pswarm.checkpoint.safetensors_store import SafetensorsStore, open_safetensors
from p2pswarm.core.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
NUMBERS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""What of the config decides, with the tensors, what an adapter computes; the rest tells how it was trained."""
PICKLE_REFUSAL = (
    "{name} is refused: its weights are only there as a pickle ({pickles}), which runs whatever code it contains when "
    "it is loaded; ask its author for safetensors"
)


class AdapterFiles:
    """One adapter's config and tensors. What is read is a view of the mapped file and must not be written to."""

    def __init__(self, name: str, config: Mapping[str, Any], weights: Path, sha256: str) -> None:
        self.config = config
        numbers = {key: config.get(key) for key in NUMBERS}
        self.adapter_id = f"{name}@{fingerprint(numbers, {WEIGHTS_NAME: sha256})}"
        """`name@fingerprint`: adapters that compute something else have another one."""
        file: Any = open_safetensors(weights)
        names: list[str] = file.keys()
        self.shapes: Mapping[str, tuple[int, ...]] = {key: tuple(file.get_slice(key).get_shape()) for key in names}
        """Of the tensors, by name."""
        self.metadata: Mapping[str, str] = file.metadata() or {}
        """What was written beside them; they do not depend on it."""
        self._store = SafetensorsStore(dict.fromkeys(self.shapes, WEIGHTS_NAME), lambda _: weights)

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The named tensors as they are stored, on the CPU. Raises `CheckpointError`."""
        return self._store.read(names)

    def release(self) -> None:
        """Lets go of the file; more may be read."""
        self._store.release()


def open_adapter(
    place: AdapterPlace,
    *,
    token: str | None = None,
    cache_dir: Path | None = None,
    listener: ProgressListener = lambda progress: None,
) -> AdapterFiles:
    """The adapter in a folder or, whole, from the hub, which keeps it in `cache_dir`. Raises `CheckpointError`."""
    folder = Path(place.path).expanduser()
    if folder.is_dir():
        config_path, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
        _check_names(place.path, [path.name for path in folder.iterdir()])
    else:
        hub = HubModel(place.path, revision=None, token=token, cache_dir=cache_dir)
        _check_names(place.path, hub.file_names)
        config_path, weights = hub.fetch(CONFIG_NAME), hub.fetch(WEIGHTS_NAME)
    return AdapterFiles(place.name, read_config_json(config_path), weights, file_sha256(weights, listener))


def _check_names(path: str, names: Collection[str]) -> None:
    if CONFIG_NAME not in names:
        raise CheckpointError(f"{path} is no adapter of peft: it has no {CONFIG_NAME}")
    if WEIGHTS_NAME in names:
        return
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise CheckpointError(PICKLE_REFUSAL.format(name=path, pickles=", ".join(pickles)))
    raise CheckpointError(f"{path} has no {WEIGHTS_NAME}")
