"""Against a hub that answers from a local folder and counts what is asked of it."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint import hub as hub_module
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.hub_ranges import FilePart
from p2pswarm.checkpoint.hub_store import PROBABLE_HEADER_BYTES
from p2pswarm.core.errors import CheckpointError, ConfigError
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Holds one model, `tiny/llama`, in a folder."""

    def __init__(self, folder: Path, downloads: Path) -> None:
        self.folder = folder
        self.downloads = downloads
        self.parts_read: list[FilePart] = []
        self.is_reachable = True
        self.commit = COMMIT

    def model_info(self, name: str, *, revision: str | None, files_metadata: bool, timeout: float) -> Any:
        if not self.is_reachable:
            raise HTTPError("name or service not known")
        if name != "tiny/llama":
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None, status_code=404))
        return SimpleNamespace(sha=self.commit, siblings=[self._sibling(path) for path in self.folder.iterdir()])

    def _sibling(self, path: Path) -> Any:
        is_large = path.suffix in (".safetensors", ".bin")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        lfs = SimpleNamespace(sha256=sha256) if is_large else None
        return SimpleNamespace(rfilename=path.name, size=path.stat().st_size, blob_id=sha256[:40], lfs=lfs)

    def download(self, name: str, file_name: str, *, revision: str, **options: Any) -> str:
        assert revision == self.commit
        target = self.downloads / "models--tiny--llama" / "snapshots" / revision / file_name
        if not target.exists():
            if not self.is_reachable:
                raise LocalEntryNotFoundError("not in the cache")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / file_name, target)
        return str(target)

    def read_part(self, url: str, headers: Mapping[str, str], part: FilePart) -> Iterator[bytes]:
        if not self.is_reachable:
            raise HTTPError("name or service not known")
        self.parts_read.append(part)
        assert url.endswith(f"/tiny/llama/resolve/{self.commit}/{part.file_name}")
        content = (self.folder / part.file_name).read_bytes()
        assert len(content) == part.file_bytes
        yield content[part.start : part.end]

    def bytes_read(self) -> int:
        return sum(part.end - part.start for part in self.parts_read)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(save_tiny_checkpoint(tmp_path / "llama", "llama", sharded=True), tmp_path / "downloads")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    monkeypatch.setattr(hub_module, "read_part", fake.read_part)
    return fake


def test_a_server_downloads_only_the_blocks_of_its_span(hub: FakeHub) -> None:
    checkpoint = open_checkpoint("tiny/llama")

    load_span(checkpoint, Span(0, 1))
    checkpoint.model_id  # noqa: B018

    total_bytes = sum(path.stat().st_size for path in hub.folder.glob("*.safetensors"))
    assert 0 < hub.bytes_read() < total_bytes / 4
    assert len({part.file_name for part in hub.parts_read}) < len(list(hub.folder.glob("*.safetensors")))


def test_sharded_tensors_are_those_of_the_folder(hub: FakeHub) -> None:
    got, expected = open_checkpoint("tiny/llama"), open_checkpoint(str(hub.folder))

    tensors, truth = got.read(got.tensor_names), expected.read(expected.tensor_names)

    assert tensors.keys() == truth.keys()
    assert all(torch.equal(tensors[name], truth[name]) for name in truth)


def test_another_commit_with_the_same_weights_downloads_none(hub: FakeHub) -> None:
    before = open_checkpoint("tiny/llama")
    load_span(before, Span(0, 2))
    hub.commit = COMMIT[::-1]
    (hub.folder / "README.md").write_text("Now with a description.")
    num_parts = len(hub.parts_read)

    again = open_checkpoint("tiny/llama")
    load_span(again, Span(0, 2))

    assert again.model_id == before.model_id
    assert len(hub.parts_read) == num_parts


def test_a_span_larger_than_the_disk_limit_is_refused_before_anything_is_downloaded(hub: FakeHub) -> None:
    checkpoint = open_checkpoint("tiny/llama", max_disk_bytes=100_000)
    checkpoint.tensor_names  # noqa: B018

    with pytest.raises(ConfigError, match=r"no room for .* a limit of 98 KiB.*serve fewer blocks, raise --max-disk"):
        load_span(checkpoint, Span(0, 8))

    assert all(part.end <= PROBABLE_HEADER_BYTES for part in hub.parts_read)


def test_a_server_that_moves_makes_room_for_its_new_blocks(hub: FakeHub, own_cache: Path) -> None:
    checkpoint = open_checkpoint("tiny/llama", max_disk_bytes=500_000)
    load_span(checkpoint, Span(0, 2))
    kept = set(own_cache.rglob("*.safetensors"))

    checkpoint.release()
    load_span(checkpoint, Span(4, 6))

    assert sum(path.stat().st_size for path in own_cache.rglob("*.safetensors")) <= 500_000
    assert not kept <= set(own_cache.rglob("*.safetensors"))


def test_the_author_s_settings_for_generation_come_along(hub: FakeHub) -> None:
    settings = open_checkpoint("tiny/llama").generation_config

    assert settings is not None
    assert settings.eos_token_id == 2


def test_hub_id_and_local_copy_have_the_same_model_id(hub: FakeHub) -> None:
    assert open_checkpoint("tiny/llama").model_id == open_checkpoint(str(hub.folder)).model_id


def test_a_model_used_before_opens_without_the_hub(hub: FakeHub) -> None:
    before = open_checkpoint("tiny/llama")
    before.read(before.tensor_names)
    hub.is_reachable = False

    again = open_checkpoint("tiny/llama")

    assert again.model_id == before.model_id
    assert load_span(again, Span(0, 1)).span == Span(0, 1)


def test_an_unreachable_hub_is_told_from_an_unknown_model(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="no such model on the hub"):
        open_checkpoint("tiny/other")
    hub.is_reachable = False
    with pytest.raises(CheckpointError, match=r"hub cannot be reached.*name or service not known"):
        open_checkpoint("tiny/llama")


def test_a_hub_model_with_only_pickles_is_refused(hub: FakeHub) -> None:
    for file in hub.folder.glob("model*"):
        file.unlink()
    (hub.folder / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*runs whatever code"):
        open_checkpoint("tiny/llama")
