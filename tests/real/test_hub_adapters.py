"""Adapters from a hub over real sockets are those of the folder they were uploaded from."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import MODEL, HubServer, serve_hub, use_hub
from huggingface_hub.utils import close_session
from safetensors.torch import save_file

from p2pswarm.checkpoint.adapter_files import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from p2pswarm.checkpoint.adapter_place import AdapterPlace
from p2pswarm.checkpoint.cache_directory import CACHE_VARIABLE
from p2pswarm.core.errors import CheckpointError

pytestmark = pytest.mark.real

TENSOR = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    save_file({TENSOR: torch.randn(2, 8)}, folder / WEIGHTS_NAME)
    with serve_hub(folder) as server:
        use_hub(server, monkeypatch, tmp_path / "downloads")
        yield server
        close_session()


def test_an_adapter_of_the_hub_is_that_of_the_folder(hub: HubServer) -> None:
    remote = open_adapter(AdapterPlace.parse(MODEL))
    local = open_adapter(AdapterPlace(str(hub.folder), "llama"))
    assert remote.adapter_id == local.adapter_id
    assert remote.shapes == {TENSOR: (2, 8)}
    assert torch.equal(remote.read([TENSOR])[TENSOR], local.read([TENSOR])[TENSOR])


def test_a_gated_adapter_needs_the_token(hub: HubServer) -> None:
    hub.good_token = "hf_good"
    with pytest.raises(CheckpointError, match="gated"):
        open_adapter(AdapterPlace.parse(MODEL))
    assert open_adapter(AdapterPlace.parse(MODEL), token="hf_good").shapes == {TENSOR: (2, 8)}


def test_a_pickle_on_the_hub_is_refused_without_a_download(hub: HubServer) -> None:
    (hub.folder / WEIGHTS_NAME).rename(hub.folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"tiny/llama is refused: .*a pickle \(adapter_model.bin\)"):
        open_adapter(AdapterPlace.parse(MODEL))
    assert hub.large_requests() == []
