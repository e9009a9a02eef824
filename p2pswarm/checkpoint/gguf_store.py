"""Tensors of a `.gguf` file under the names, shapes and layouts that transformers gives them.

A GGUF file holds quantised blocks under names of its own. Its tensors are dequantised to float32 by the `gguf`
package, renamed and laid out by transformers' tables, and kept as safetensors in the cache: one file for each
transformer block and one for each tensor outside the blocks, so that a server converts only its span's, once. It could
not convert at each start instead: for ten blocks of SmolLM2 that takes 0.6 s, at 64 million weights a second, and 6 s
for the file's directory and transformers' tables, on one 2.4 GHz core; mapping converted ones takes none.

    <weight cache>/gguf/<sha256 of the file>/config.json, tokenizer.json, ..., tensors.json,
        blk.3.safetensors, output_norm.weight.safetensors, ...
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save

from p2pswarm.checkpoint.cache_directory import write_atomically
from p2pswarm.checkpoint.progress import Progress, ProgressListener, Work
from p2pswarm.checkpoint.safetensors_store import SafetensorsStore
from p2pswarm.checkpoint.weight_cache import WHOLE_SUFFIX, WeightCache
from p2pswarm.core.errors import CheckpointError, UnsupportedModelError

CACHE_LAYOUT = "1"
"""Raise this when what is cached changes."""
BLOCK_NAME = re.compile(r"blk\.\d+\.")


class GgufStore:
    """The tensors, config and tokenizer of one GGUF file, all of them from the cache where they are in it."""

    def __init__(self, path: Path, sha256: str, cache: WeightCache, listener: ProgressListener) -> None:
        self.path = path
        self._cache = cache
        self._listener = listener
        self._key = f"gguf/{sha256}-{CACHE_LAYOUT}"
        self._folder = cache.folder / self._key

    @property
    def tensor_names(self) -> frozenset[str]:
        return self._opened.tensor_names

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        self._convert(sorted({self._group_of[name] for name in names if name in self._group_of}))
        return self._opened.read(names)

    def release(self) -> None:
        self._opened.release()
        self._cache.release()

    def config_folder(self) -> Path:
        """A folder with the `config.json` that the file's metadata amounts to."""
        path = self._folder / "config.json"
        if not path.exists():
            config = _config(self.path)
            write_atomically(path, lambda temporary: config.to_json_file(temporary, use_diff=False))
        return self._folder

    def tokenizer_folder(self) -> Path:
        """A folder from which `AutoTokenizer` loads the file's tokenizer; it, too, holds the config."""
        from transformers import AutoTokenizer

        folder = self.config_folder()
        if not (folder / "tokenizer.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
            with tempfile.TemporaryDirectory(dir=folder) as staging:
                tokenizer.save_pretrained(staging)
                # `tokenizer.json` last: where it stands, the rest does too.
                for part in sorted(Path(staging).iterdir(), key=lambda part: part.name == "tokenizer.json"):
                    part.replace(folder / part.name)
        return folder

    @cached_property
    def _opened(self) -> SafetensorsStore:
        return SafetensorsStore(self._group_of, lambda group: self._cache.folder / self._key_of(group))

    @cached_property
    def _group_of(self) -> dict[str, str]:
        """Which group holds which tensor."""
        path = self._folder / "tensors.json"
        if not path.exists():
            groups = {name: group for group, names in self._conversion.names_of.items() for name in names}
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(groups)))
        return dict(json.loads(path.read_text()))

    def _key_of(self, group: str) -> str:
        return f"{self._key}/{group}{WHOLE_SUFFIX}"

    def _convert(self, groups: Collection[str]) -> None:
        """Has these groups in the cache, and holds them there."""
        found = {group: self._cache.find(self._key_of(group)) for group in groups}
        if all(found.values()):
            return
        sizes = {
            group: self._conversion.size_bytes(group) if path is None else path.stat().st_size
            for group, path in found.items()
        }
        self._cache.require_room({self._key_of(group): size for group, size in sizes.items()})
        absent = [group for group, path in found.items() if path is None]
        total_bytes = sum(sizes[group] for group in absent)
        done_bytes = 0
        for group in absent:
            self._listener(Progress(Work.CONVERTING, self.path.name, done_bytes, total_bytes))
            self._cache.add(self._key_of(group), sizes[group], partial(self._write, group))
            done_bytes += sizes[group]

    def _write(self, group: str, file: BinaryIO) -> None:
        content = save(self._conversion.convert(group))
        file.seek(0)
        file.write(content)
        file.truncate()

    @cached_property
    def _conversion(self) -> "_Conversion":
        return _Conversion(self.path, self.config_folder())


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except (ValueError, KeyError, IndexError) as error:
        raise UnsupportedModelError(f"transformers cannot make a config of {path}: {error}") from error


class _Conversion:
    """An open GGUF file and transformers' tables for it. Reading the file's directory takes seconds, so it is made
    when needed.
    """

    def __init__(self, path: Path, config_folder: Path) -> None:
        from gguf import GGUFReader
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        config = AutoConfig.from_pretrained(config_folder)
        try:
            reader = GGUFReader(path)
            architecture = reader.fields["general.architecture"].contents()
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            processor_class: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
            self._processor = processor_class(config=config.to_dict())
            self._name_of: Mapping[str, str] = get_gguf_hf_weights_map(model, self._processor)
        except (ValueError, KeyError, IndexError, NotImplementedError) as error:
            raise UnsupportedModelError(f"{path} cannot be converted: {error}") from error
        self._tensors_of: dict[str, list[Any]] = defaultdict(list)
        self.names_of: dict[str, set[str]] = defaultdict(set)
        """The transformers names of the tensors in each group."""
        for tensor in reader.tensors:
            name = self._name_of.get(tensor.name) or self._name_of.get(tensor.name.removesuffix(".weight"))
            if name is None:
                continue
            match = BLOCK_NAME.match(tensor.name)
            group = match.group().removesuffix(".") if match else tensor.name
            self._tensors_of[group].append(tensor)
            self.names_of[group].add(name)

    def size_bytes(self, group: str) -> int:
        """What the group's tensors take in float32."""
        return sum(int(tensor.n_elements) for tensor in self._tensors_of[group]) * torch.float32.itemsize

    def convert(self, group: str) -> dict[str, torch.Tensor]:
        """The group's tensors in float32, by transformers' names."""
        from gguf import dequantize

        merged: dict[str, torch.Tensor] = {}
        converted: dict[str, torch.Tensor] = {}
        for tensor in self._tensors_of[group]:
            weights, name, _ = self._processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=self._name_of,
                parsed_parameters={"tensors": merged},
            )
            if name in self._name_of:
                converted[self._name_of[name]] = torch.from_numpy(weights.copy()).to(torch.float32)
        converted.update({name: tensor.to(torch.float32) for name, tensor in merged.items()})
        missing = self.names_of[group] - converted.keys()
        if missing:
            raise CheckpointError(f"the GGUF tensors of {group} do not yield {', '.join(sorted(missing))}")
        return {name: converted[name].contiguous() for name in sorted(converted)}
