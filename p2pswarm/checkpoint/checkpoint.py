"""A model as it lies on a disk or a hub: its config, its tensors by name, its tokenizer, and the id that all peers
give it.

`open_checkpoint` takes a local Hugging Face folder, a `.gguf` file or a hub id. Only safetensors are read; a GGUF is
converted (`gguf_store.py`), a hub's file fetched by parts (`hub_store.py`), a pickle refused. Which tensors make up a
span is not known here: `blocks/` asks for what it needs.
"""

import re
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from p2pswarm.checkpoint.cache_directory import cache_directory
from p2pswarm.checkpoint.fingerprint import file_sha256, fingerprint
from p2pswarm.checkpoint.gguf_store import GgufStore
from p2pswarm.checkpoint.hub import HubModel
from p2pswarm.checkpoint.hub_store import HubStore
from p2pswarm.checkpoint.local_folder import CONFIG_NAME, GENERATION_CONFIG_NAME, read_config_json, weight_files
from p2pswarm.checkpoint.progress import Progress, ProgressListener
from p2pswarm.checkpoint.safetensors_store import SafetensorsStore, TensorStore
from p2pswarm.checkpoint.weight_cache import WeightCache
from p2pswarm.core.errors import CheckpointError, UnsupportedModelError
from p2pswarm.core.ids import ModelId

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

HUB_SNAPSHOT = re.compile(r"models--(?:.+--)?(?P<name>[^/]+)/snapshots/[0-9a-f]+/?$")
"""How the hub's own cache names the folder of a model."""


class Checkpoint:
    """One model's config and weights. Tensors read from it are views of mapped files and must not be written to."""

    def __init__(
        self,
        name: str,
        store: TensorStore,
        *,
        config_folder: Path,
        raw_config: Mapping[str, Any] | None,
        weight_hashes: Callable[[], Mapping[str, str]],
        tokenizer_folder: Callable[[], Path],
    ) -> None:
        self.name = name
        self._store = store
        self._config_folder = config_folder
        self._raw_config = raw_config
        self._weight_hashes = weight_hashes
        self._tokenizer_folder = tokenizer_folder

    @cached_property
    def model_id(self) -> ModelId:
        """`name@fingerprint`. The first time, this reads all weight files of a local model to hash them."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name)
        return ModelId(f"{readable}@{fingerprint(self._raw_config, self._weight_hashes())}")

    @cached_property
    def config(self) -> "PretrainedConfig":
        from transformers import AutoConfig

        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(self._config_folder, trust_remote_code=False)
        except (ValueError, KeyError, OSError) as error:
            raise UnsupportedModelError(f"transformers cannot use the config of {self.name}: {error}") from error
        return config

    @property
    def num_blocks(self) -> int:
        """Transformer blocks of the (text) model."""
        return int(self.config.get_text_config(decoder=True).num_hidden_layers)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in: as the config says, else as its first tensor is."""
        stated = getattr(self.config.get_text_config(decoder=True), "dtype", None)
        if isinstance(stated, torch.dtype) and self._raw_config is not None:
            return stated
        names = sorted(self.tensor_names)
        if not names:
            raise CheckpointError(f"{self.name} holds no tensors")
        return self.read(names[:1])[names[0]].dtype

    @property
    def tensor_names(self) -> frozenset[str]:
        return self._store.tensor_names

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The named tensors as they are stored, on the CPU. Raises `CheckpointError` when one is missing or a file
        damaged.
        """
        return self._store.read(names)

    def release(self) -> None:
        """Lets go of what was read so far, so that others may remove it from the weight cache when they need room.

        Tensors stay valid, and more may be read.
        """
        self._store.release()

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self._tokenizer_folder(), trust_remote_code=False
        )
        return tokenizer

    @cached_property
    def generation_config(self) -> "GenerationConfig | None":
        """The author's defaults for `generate`; None where there are none."""
        from transformers import GenerationConfig

        if not (self._config_folder / GENERATION_CONFIG_NAME).exists():
            return None
        return GenerationConfig.from_pretrained(self._config_folder)


def _not_told(progress: Progress) -> None:
    pass


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    max_disk_bytes: int | None = None,
    listener: ProgressListener = _not_told,
) -> Checkpoint:
    """The checkpoint named by a local folder, a `.gguf` file or a hub id.

    `revision` and `token` are for the hub only. What is downloaded or converted is kept in `cache_dir` (None: where the
    user's caches are), weights up to `max_disk_bytes` in all, and always so that some of the disk stays free.
    Raises `CheckpointError`, `UnsupportedModelError`, or `ConfigError` where there is no room.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path, listener)
    weights = (cache_dir or cache_directory()) / "weights"
    cache = WeightCache(weights, max_disk_bytes, listener=listener)
    if path.suffix == ".gguf":
        return _open_gguf(path, cache, listener)
    if path.exists():
        raise CheckpointError(f"{model} is a file but no .gguf; a MODEL is a folder, a .gguf file or a hub id")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise CheckpointError(f"there is no folder {model}, and it cannot be a hub id")
    return _open_hub(HubModel(model, revision=revision, token=token, cache_dir=cache_dir), cache, listener)


def _open_folder(folder: Path, listener: ProgressListener) -> Checkpoint:
    raw_config = read_config_json(folder / CONFIG_NAME)
    file_of = weight_files(folder)
    snapshot = HUB_SNAPSHOT.search(folder.resolve().as_posix())
    return Checkpoint(
        snapshot["name"] if snapshot else folder.resolve().name,
        SafetensorsStore(file_of, lambda file_name: folder / file_name),
        config_folder=folder,
        raw_config=raw_config,
        weight_hashes=lambda: {name: file_sha256(folder / name, listener) for name in sorted(set(file_of.values()))},
        tokenizer_folder=lambda: folder,
    )


def _open_gguf(path: Path, cache: WeightCache, listener: ProgressListener) -> Checkpoint:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with GGUF")
    sha256 = file_sha256(path, listener)
    store = GgufStore(path, sha256, cache, listener)
    return Checkpoint(
        path.stem,
        store,
        config_folder=store.config_folder(),
        raw_config=None,
        weight_hashes=lambda: {"gguf": sha256},
        tokenizer_folder=store.tokenizer_folder,
    )


def _open_hub(hub: HubModel, cache: WeightCache, listener: ProgressListener) -> Checkpoint:
    config_folder = hub.config_folder()
    raw_config = read_config_json(config_folder / CONFIG_NAME)
    return Checkpoint(
        hub.name.split("/")[-1],
        HubStore(hub, cache, listener),
        config_folder=config_folder,
        raw_config=raw_config,
        weight_hashes=hub.weight_hashes,
        tokenizer_folder=hub.tokenizer_folder,
    )
