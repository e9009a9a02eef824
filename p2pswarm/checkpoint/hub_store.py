"""Tensors of a model on the hub, by parts: of a file of gigabytes, only what belongs to the blocks asked for.

Tensors are fetched in groups, those of a block together (`tensor_groups.py`). A group becomes a small safetensors file
in the weight cache, filled from the ranges of the hub's files in which its tensors lie. Cut off, it goes on from where
it was. Sizes are checked against header and hub, and the sha256 of each file whose tensors are all here.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from p2pswarm.checkpoint.cache_directory import write_atomically
from p2pswarm.checkpoint.local_folder import SINGLE_FILE_NAME
from p2pswarm.checkpoint.progress import Progress, ProgressListener, Work
from p2pswarm.checkpoint.safetensors_header import LENGTH, TensorPlace, header_size, parse_header
from p2pswarm.checkpoint.safetensors_store import SafetensorsStore
from p2pswarm.checkpoint.tensor_groups import Group, Part, group_of, make_group, ranges_of
from p2pswarm.checkpoint.weight_cache import WHOLE_SUFFIX, WeightCache
from p2pswarm.core.errors import CheckpointError

PROBABLE_HEADER_BYTES = 1 << 16
"""64 KiB hold the headers of most files: one request instead of two."""
CHUNK_BYTES = 1 << 22


class RemoteFiles(Protocol):
    """Files somewhere else; `hub.HubModel` is one. All of it raises `CheckpointError`."""

    @property
    def name(self) -> str: ...

    @property
    def weights_key(self) -> str: ...

    @property
    def index(self) -> Mapping[str, str] | None: ...

    def file(self, file_name: str) -> "RemoteFile": ...

    def local_copy(self, file_name: str) -> Path | None: ...

    def read_part(self, file_name: str, start: int, end: int) -> Iterator[bytes]: ...


class RemoteFile(Protocol):
    @property
    def size_bytes(self) -> int: ...

    @property
    def sha256(self) -> str | None: ...


class HubStore:
    """A `TensorStore`. Files that were downloaded whole by other means are read where they lie."""

    def __init__(self, remote: RemoteFiles, cache: WeightCache, listener: ProgressListener) -> None:
        self._remote = remote
        self._index = remote.index  # at once, so that a model without safetensors is refused when it is opened
        self._cache = cache
        self._listener = listener
        self._headers: dict[str, dict[str, TensorPlace]] = {}
        """Of each file that was looked into: its tensors by name, in the order in which they lie."""
        self._here: dict[str, Group] = {}
        """Groups that were asked for, by name; all of them are in the cache, and held there."""

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        missing = sorted(set(names) - self._file_of.keys())
        if missing:
            raise CheckpointError(f"{self._remote.name} has no tensors {', '.join(missing)}")
        local_files = {name: self._remote.local_copy(name) for name in {self._file_of[name] for name in names}}
        groups = {group_of(name) for name in names if local_files[self._file_of[name]] is None}
        self._fetch(sorted(groups - self._here.keys()))
        whereabouts = {}
        for name in names:
            local = local_files[self._file_of[name]]
            path = self._cache.folder / self._here[group_of(name)].key if local is None else local
            whereabouts[name] = str(path)
        return SafetensorsStore(whereabouts, Path).read(names)

    def release(self) -> None:
        self._here.clear()
        self._cache.release()

    @cached_property
    def _file_of(self) -> Mapping[str, str]:
        if self._index is not None:
            return self._index
        return dict.fromkeys(self._header(SINGLE_FILE_NAME), SINGLE_FILE_NAME)

    @cached_property
    def _names_in(self) -> Mapping[str, list[str]]:
        """The tensors of each group."""
        names_in = defaultdict(list)
        for name in self._file_of:
            names_in[group_of(name)].append(name)
        return names_in

    def _fetch(self, names: list[str]) -> None:
        """Has these groups in the cache, and holds them there."""
        groups = {name: self._group(name) for name in names}
        absent = [group for group in groups.values() if self._cache.find(group.key) is None]
        if absent:
            self._cache.require_room({group.key: group.size_bytes for group in groups.values()})
        download = _Download(self._remote, self._listener, sum(group.size_bytes for group in absent))
        for group in absent:
            self._cache.add(group.key, group.size_bytes, partial(download.fill, group))
            download.done_bytes_before += group.size_bytes
        self._here |= groups
        for file_name in sorted({part.file_name for group in absent for part in group.parts}):
            self._verify(file_name)

    def _group(self, name: str) -> Group:
        parts = []
        for tensor_name in self._names_in[name]:
            file_name = self._file_of[tensor_name]
            place = self._header(file_name).get(tensor_name)
            if place is None:
                raise CheckpointError(f"{file_name} of {self._remote.name} lacks {tensor_name}, which the index names")
            parts.append(Part(file_name, place))
        return make_group(f"{self._folder}/{name.replace('/', '--')}{WHOLE_SUFFIX}", parts)

    @property
    def _folder(self) -> str:
        return f"hub/{self._remote.weights_key}"

    def _header(self, file_name: str) -> dict[str, TensorPlace]:
        if file_name not in self._headers:
            raw = self._raw_header(file_name)
            places = parse_header(raw, self._remote.file(file_name).size_bytes, file_name)
            self._headers[file_name] = {place.name: place for place in places}
        return self._headers[file_name]

    def _raw_header(self, file_name: str) -> bytes:
        """As it is in the hub's file. Kept in the cache beside the groups, for a start without the hub."""
        path = self._header_path(file_name)
        if path.exists():
            return path.read_bytes()
        header = self._read_header(file_name)
        parse_header(header, self._remote.file(file_name).size_bytes, file_name)  # nothing damaged is kept
        write_atomically(path, lambda temporary: temporary.write_bytes(header))
        return header

    def _header_path(self, file_name: str) -> Path:
        return self._cache.folder / self._folder / f"{file_name}.header"

    def _read_header(self, file_name: str) -> bytes:
        file_bytes = self._remote.file(file_name).size_bytes
        if (local := self._remote.local_copy(file_name)) is not None:
            with local.open("rb") as file:
                first_bytes = file.read(LENGTH.size)
                return first_bytes + file.read(header_size(first_bytes, file_bytes, file_name) - LENGTH.size)
        fetched = b"".join(self._remote.read_part(file_name, 0, min(PROBABLE_HEADER_BYTES, file_bytes)))
        size = header_size(fetched, file_bytes, file_name)
        if size > len(fetched):
            fetched += b"".join(self._remote.read_part(file_name, len(fetched), size))
        return fetched[:size]

    def _verify(self, file_name: str) -> None:
        """Raises `CheckpointError` where all of a file is here and is not what the hub says it is."""
        expected = self._remote.file(file_name).sha256
        places = self._header(file_name)
        groups = [self._here[name] for name in {group_of(name) for name in places} & self._here.keys()]
        positions = {tensor: (group.key, at) for group in groups for tensor, at in group.positions().items()}
        if expected is None or any((file_name, name) not in positions for name in places):
            return
        digest = hashlib.sha256(self._raw_header(file_name))
        for name, place in places.items():
            key, position = positions[file_name, name]
            for chunk in _bytes_at(self._cache.folder / key, position, place.size_bytes):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            self._remove(file_name)
            raise CheckpointError(
                f"{file_name} of {self._remote.name} arrived damaged: its sha256 is {digest.hexdigest()}, the hub "
                f"states {expected}; it has been removed, start again to download it again"
            )

    def _remove(self, file_name: str) -> None:
        """Removes whatever came from a file."""
        for name in {group_of(name) for name in self._headers.pop(file_name)}:
            self._cache.remove(self._here.pop(name).key)
        self._header_path(file_name).unlink()


def _bytes_at(path: Path, position: int, num_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(position)
        while num_bytes and (chunk := file.read(min(CHUNK_BYTES, num_bytes))):
            num_bytes -= len(chunk)
            yield chunk


class _Download:
    """Groups on their way from the hub, one after the other."""

    def __init__(self, remote: RemoteFiles, listener: ProgressListener, total_bytes: int) -> None:
        self._remote = remote
        self._listener = listener
        self._total_bytes = total_bytes
        self.done_bytes_before = 0
        """Of the groups before the one that comes now."""

    def fill(self, group: Group, file: BinaryIO) -> None:
        """Writes the rest of a group to a file that may hold its beginning."""
        done_bytes = _usable_bytes(file, group)
        file.seek(done_bytes)
        file.truncate()
        file.write(group.header[done_bytes:])
        skipped_bytes = max(done_bytes - len(group.header), 0)
        for file_name, start, end in ranges_of(group.parts):
            skipped_here = min(skipped_bytes, end - start)
            skipped_bytes -= skipped_here
            if start + skipped_here == end:
                continue
            for chunk in self._remote.read_part(file_name, start + skipped_here, end):
                file.write(chunk)
                self._tell(self.done_bytes_before + file.tell())

    def _tell(self, done_bytes: int) -> None:
        self._listener(Progress(Work.DOWNLOADING, self._remote.name, done_bytes, self._total_bytes))


def _usable_bytes(file: BinaryIO, group: Group) -> int:
    """How much of the file is the group's beginning; a header that is not makes it none."""
    present_bytes = file.tell()
    file.seek(0)
    header = file.read(len(group.header))
    return min(present_bytes, group.size_bytes) if header == group.header else 0
