"""Against a hub that answers from a local folder and counts what is asked of it."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.errors import CheckpointError
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Holds one model, `tiny/llama`, in a folder."""

    def __init__(self, folder: Path, downloads: Path) -> None:
        self.folder = folder
        self.downloads = downloads
        self.downloaded: list[str] = []
        self.is_reachable = True

    def model_info(self, name: str, *, revision: str | None, files_metadata: bool) -> Any:
        if not self.is_reachable:
            raise HTTPError("name or service not known")
        if name != "tiny/llama":
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None, status_code=404))
        return SimpleNamespace(sha=COMMIT, siblings=[self._sibling(path) for path in self.folder.iterdir()])

    def _sibling(self, path: Path) -> Any:
        is_large = path.suffix in (".safetensors", ".bin")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return SimpleNamespace(rfilename=path.name, lfs=SimpleNamespace(sha256=sha256) if is_large else None)

    def download(self, name: str, file_name: str, *, revision: str, **options: Any) -> str:
        assert revision == COMMIT
        target = self.downloads / "models--tiny--llama" / "snapshots" / COMMIT / file_name
        if not target.exists():
            if not self.is_reachable:
                raise LocalEntryNotFoundError("not in the cache")
            self.downloaded.append(file_name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / file_name, target)
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(save_tiny_checkpoint(tmp_path / "llama", "llama", sharded=True), tmp_path / "downloads")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake


def test_a_server_downloads_only_the_shards_of_its_span(hub: FakeHub) -> None:
    checkpoint = open_checkpoint("tiny/llama")

    load_span(checkpoint, Span(0, 1))
    checkpoint.model_id  # noqa: B018

    shards = [name for name in hub.downloaded if name.endswith(".safetensors")]
    total = len(list(hub.folder.glob("*.safetensors")))
    assert 1 <= len(shards) < total


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
