"""Against files in memory, which are cut off, damaged and counted as a test wants."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from p2pswarm.checkpoint.hub import HubFile
from p2pswarm.checkpoint.hub_store import PROBABLE_HEADER_BYTES, HubStore
from p2pswarm.checkpoint.progress import Progress
from p2pswarm.checkpoint.tensor_groups import group_of
from p2pswarm.checkpoint.weight_cache import WeightCache
from p2pswarm.core.errors import CheckpointError

NAMES = ("embed.weight", *(f"model.layers.{block}.{part}" for block in range(3) for part in ("a", "b.weight")), "norm")


def tensors_of(names: tuple[str, ...] = NAMES) -> dict[str, torch.Tensor]:
    return {name: torch.arange(5 + index, dtype=torch.float32) + 100 * index for index, name in enumerate(names)}


class Cut(Exception):
    """The connection ended."""


class FilesInMemory:
    """A model whose tensors are spread over files as `layout` says: a tuple of names for each."""

    name = "tiny/memory"
    weights_key = "tiny--memory-1"

    def __init__(self, *layout: tuple[str, ...]) -> None:
        self.tensors = tensors_of()
        self.contents = {
            ("model.safetensors" if len(layout) == 1 else f"model-{number}.safetensors"): save(
                {name: self.tensors[name] for name in names}
            )
            for number, names in enumerate(layout)
        }
        self.hashes = {name: hashlib.sha256(content).hexdigest() for name, content in self.contents.items()}
        self.index: Mapping[str, str] | None = None
        if len(layout) > 1:
            self.index = {name: f"model-{number}.safetensors" for number, names in enumerate(layout) for name in names}
        self.parts_read: list[tuple[str, int, int]] = []
        self.bytes_until_cut: int | None = None

    def file(self, file_name: str) -> HubFile:
        return HubFile(len(self.contents[file_name]), self.hashes[file_name], "blob")

    def local_copy(self, file_name: str) -> Path | None:
        return None

    def read_part(self, file_name: str, start: int, end: int) -> Iterator[bytes]:
        self.parts_read.append((file_name, start, end))
        for position in range(start, end, 16):
            chunk = self.contents[file_name][position : min(position + 16, end)]
            if self.bytes_until_cut is not None:
                chunk = chunk[: self.bytes_until_cut]
                self.bytes_until_cut -= len(chunk)
            yield chunk
            if self.bytes_until_cut == 0:
                raise Cut


def store_of(files: FilesInMemory, folder: Path, told: list[Progress] | None = None) -> HubStore:
    return HubStore(files, WeightCache(folder), [].append if told is None else told.append)


def check(store: HubStore, files: FilesInMemory, names: tuple[str, ...]) -> None:
    got = store.read(names)
    assert got.keys() == set(names)
    assert all(torch.equal(got[name], files.tensors[name]) for name in names)


BLOCK_1 = ("model.layers.1.a", "model.layers.1.b.weight")


@pytest.mark.parametrize(
    ("tensor", "group"),
    [
        ("model.layers.12.mlp.experts.3.up_proj.weight", "model.layers.12"),
        ("transformer.h.0.ln_1.bias", "transformer.h.0"),
        ("0.weight", "0"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.norm_2.weight", "model.norm_2.weight"),
    ],
)
def test_a_block_is_told_by_its_number_whatever_the_architecture(tensor: str, group: str) -> None:
    assert group_of(tensor) == group


def test_tensors_side_by_side_come_in_one_request(tmp_path: Path) -> None:
    files = FilesInMemory(NAMES)
    store = store_of(files, tmp_path)
    assert store.tensor_names == set(NAMES)
    files.parts_read.clear()

    check(store, files, BLOCK_1)

    ((_, start, end),) = files.parts_read
    assert end - start == sum(files.tensors[name].nbytes for name in BLOCK_1)


def test_a_block_spread_over_two_files_is_put_together(tmp_path: Path) -> None:
    files = FilesInMemory(NAMES[:4], NAMES[4:])
    assert {name: files.index and files.index[name] for name in BLOCK_1} == {
        "model.layers.1.a": "model-0.safetensors",
        "model.layers.1.b.weight": "model-1.safetensors",
    }

    check(store_of(files, tmp_path), files, BLOCK_1)


def test_one_tensor_of_a_block_brings_its_block(tmp_path: Path) -> None:
    files = FilesInMemory(NAMES)
    check(store_of(files, tmp_path), files, BLOCK_1[:1])
    files.parts_read.clear()

    check(store_of(files, tmp_path), files, BLOCK_1)

    assert files.parts_read == []


@given(cuts=st.lists(st.integers(0, 60), max_size=6), sharded=st.booleans())
@settings(deadline=None, max_examples=50)
def test_wherever_downloads_are_cut_the_tensors_are_right(cuts: list[int], sharded: bool) -> None:
    files = FilesInMemory(NAMES[:4], NAMES[4:]) if sharded else FilesInMemory(NAMES)
    with TemporaryDirectory() as folder:
        check(store_of(files, Path(folder)), files, NAMES[:1])  # so that the headers of the first file are here
        for cut in cuts:
            files.bytes_until_cut = cut
            try:
                store_of(files, Path(folder)).read(NAMES)
            except Cut:
                continue
        files.bytes_until_cut = None

        check(store_of(files, Path(folder)), files, NAMES)


def test_the_beginning_of_another_file_is_not_gone_on_from(tmp_path: Path) -> None:
    files = FilesInMemory(NAMES)
    store = store_of(files, tmp_path)
    assert store.tensor_names  # the header is here now
    files.bytes_until_cut = 4
    with pytest.raises(Cut):
        store.read(BLOCK_1)
    (partial,) = tmp_path.rglob("*.partial")
    partial.write_bytes(b"?" * partial.stat().st_size)
    files.bytes_until_cut = None

    check(store_of(files, tmp_path), files, BLOCK_1)


def test_progress_counts_all_that_was_asked_for_at_once(tmp_path: Path) -> None:
    files = FilesInMemory(NAMES)
    told: list[Progress] = []

    check(store_of(files, tmp_path, told), files, NAMES)

    done = [progress.done_bytes for progress in told]
    assert done == sorted(done)
    assert {progress.total_bytes for progress in told} == {done[-1]}


def test_a_header_longer_than_expected_takes_a_second_request(tmp_path: Path) -> None:
    files = FilesInMemory(NAMES)
    content = save(files.tensors, metadata={"note": "x" * PROBABLE_HEADER_BYTES})
    files.contents["model.safetensors"] = content
    files.hashes["model.safetensors"] = hashlib.sha256(content).hexdigest()

    check(store_of(files, tmp_path), files, NAMES)

    assert files.parts_read[0] == ("model.safetensors", 0, PROBABLE_HEADER_BYTES)
    assert files.parts_read[1][1] == PROBABLE_HEADER_BYTES


def test_a_whole_file_with_another_sha256_is_removed(tmp_path: Path) -> None:
    files = FilesInMemory(NAMES[:4], NAMES[4:])
    files.hashes["model-1.safetensors"] = "0" * 64
    store = store_of(files, tmp_path)

    check(store, files, ("embed.weight", "model.layers.0.a"))
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors of tiny/memory arrived damaged: .* states 000"):
        store.read(NAMES)

    groups = {path.stem for path in tmp_path.rglob("*.safetensors")}
    assert groups == {"embed.weight", "model.layers.0"}


def test_a_damaged_header_is_not_kept(tmp_path: Path) -> None:
    files = FilesInMemory(NAMES)
    true_content = save(files.tensors, metadata={"note": "fine"})
    files.hashes["model.safetensors"] = hashlib.sha256(true_content).hexdigest()
    for damaged in (true_content.replace(b"fine", b"find"), true_content.replace(b'{"', b'["', 1)):
        files.contents["model.safetensors"] = damaged
        with pytest.raises(CheckpointError, match="damaged"):
            store_of(files, tmp_path).read(NAMES)
    files.contents["model.safetensors"] = true_content

    check(store_of(files, tmp_path), files, NAMES)


def test_a_file_may_hold_tensors_that_the_index_leaves_out(tmp_path: Path) -> None:
    files = FilesInMemory(NAMES[:4], NAMES[4:])
    assert files.index is not None
    files.index = {name: file for name, file in files.index.items() if name != "model.layers.0.a"}
    names = tuple(files.index)

    check(store_of(files, tmp_path), files, names)


def test_a_tensor_that_the_index_names_and_its_file_lacks_is_named(tmp_path: Path) -> None:
    files = FilesInMemory(NAMES[:4], NAMES[4:])
    assert files.index is not None
    files.index = {**files.index, "model.layers.9.a": "model-0.safetensors"}

    with pytest.raises(CheckpointError, match=r"model-0\.safetensors of tiny/memory lacks model\.layers\.9\.a"):
        store_of(files, tmp_path).read(["model.layers.9.a"])


def test_a_tensor_that_nobody_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny/memory has no tensors nowhere\.weight"):
        store_of(FilesInMemory(NAMES), tmp_path).read(["nowhere.weight"])
