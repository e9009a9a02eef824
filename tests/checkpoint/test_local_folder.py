import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.fingerprint import file_sha256
from p2pswarm.checkpoint.progress import Progress, Work
from p2pswarm.core.errors import CheckpointError, ConfigError, UnsupportedModelError
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "tiny-llama", "llama")


def shard(folder: Path) -> None:
    """Splits the folder's one file in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + (position >= len(names) // 2)}.safetensors" for position, name in enumerate(names)}
    for file_name in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file_name}, folder / file_name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_folder_opens_with_its_config_tensors_and_dtype(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))

    assert checkpoint.name == "tiny-llama"
    assert checkpoint.num_blocks == 8
    assert checkpoint.dtype == torch.float32
    assert "model.layers.7.mlp.up_proj.weight" in checkpoint.tensor_names
    tensors = checkpoint.read(["model.norm.weight"])
    assert torch.equal(tensors["model.norm.weight"], load_file(folder / "model.safetensors")["model.norm.weight"])


def test_a_sharded_checkpoint_has_the_same_tensors(folder: Path) -> None:
    whole = open_checkpoint(str(folder))
    expected = {name: tensor.clone() for name, tensor in whole.read(whole.tensor_names).items()}
    shard(folder)

    sharded = open_checkpoint(str(folder))

    got = sharded.read(sharded.tensor_names)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-2.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"lacks model-2\.safetensors"):
        open_checkpoint(str(folder))


def test_an_index_may_not_point_outside_its_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../secret.safetensors"}}')

    with pytest.raises(CheckpointError, match="not beside it"):
        open_checkpoint(str(folder))


def test_pickled_weights_are_refused_with_the_reason(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*runs whatever code"):
        open_checkpoint(str(folder))


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not tensors at all")

    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        open_checkpoint(str(folder))


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))


def test_a_model_that_brings_its_own_code_is_refused_without_asking(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    code = {"model_type": "novel", "auto_map": {"AutoConfig": "configuration_novel.NovelConfig"}}
    (folder / "config.json").write_text(json.dumps({**config, **code}))

    with pytest.raises(UnsupportedModelError, match="cannot use the config of tiny-llama"):
        open_checkpoint(str(folder)).config  # noqa: B018


def test_a_path_that_is_nothing_is_not_asked_of_the_hub() -> None:
    with pytest.raises(CheckpointError, match="cannot be a hub id"):
        open_checkpoint("/no/such/folder")


def test_missing_tensors_are_named_when_a_span_loads(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.4.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))

    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*model\.layers\.4\.mlp\.up_proj\.weight"):
        load_span(checkpoint, Span(3, 5))
    assert load_span(checkpoint, Span(5, 8)).span == Span(5, 8)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.mlp.up_proj.weight"] = torch.zeros(3, 5)
    save_file(tensors, folder / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.mlp\.up_proj\.weight has the shape \[3, 5\]"):
        load_span(open_checkpoint(str(folder)), Span(3, 5))


def test_a_copied_folder_has_the_same_id_and_changed_weights_another(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "tiny-llama"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "5.99", "_name_or_path": "x"}))
    other = save_tiny_checkpoint(tmp_path / "other" / "tiny-llama", "llama", seed=1)

    model_id = open_checkpoint(str(folder)).model_id

    assert model_id.startswith("tiny-llama@")
    assert len(model_id) == len("tiny-llama@") + 16
    assert open_checkpoint(str(copy)).model_id == model_id
    assert open_checkpoint(str(other)).model_id != model_id


def test_a_changed_config_changes_the_id(folder: Path) -> None:
    before = open_checkpoint(str(folder)).model_id
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))

    assert open_checkpoint(str(folder)).model_id != before


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    told: list[Progress] = []

    hashes = [file_sha256(file, told.append) for _ in range(2)]
    file.write_bytes(b"abcd")
    changed = file_sha256(file, told.append)

    assert hashes == ["ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"] * 2
    assert changed == "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589"
    assert told == [Progress(Work.HASHING, "weights", 3, 3), Progress(Work.HASHING, "weights", 4, 4)]


def test_a_cache_that_cannot_be_written_to_is_named_with_the_way_out(folder: Path, own_cache: Path) -> None:
    own_cache.write_text("a file, not a folder")
    with pytest.raises(ConfigError, match=r"cannot write to the cache .*cache/hashes: .*; set P2PSWARM_CACHE to"):
        file_sha256(folder / "config.json")


def test_the_tokenizer_is_the_folder_s(folder: Path) -> None:
    save_tiny_tokenizer(folder)

    tokenizer = open_checkpoint(str(folder)).tokenizer()

    assert tokenizer("w5 w9").input_ids == [5, 9]
