"""What cannot be tuned, saved or read is refused before any server is asked, and the message says what would work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tuned_models import PADLESS, Family, families

from p2pswarm.blocks.architecture import Head
from p2pswarm.core.errors import CheckpointError, ConfigError
from p2pswarm.models.auto import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)

FamilyOf = Callable[[str], Family]


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> FamilyOf:
    return families(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuning_mode": "prefix"}, "tuning_mode is ptune, deep_ptune, lora or None, got 'prefix'"),
        ({"tuning_mode": "ptune", "pre_seq_len": 0}, "pre_seq_len is a whole number, 1 or more, got 0"),
        ({"tuning_mode": "lora", "lora_rank": 0}, "lora_rank is a whole number, 1 or more, got 0"),
        ({"tuning_mode": "lora", "lora_alpha": 0.5}, "lora_alpha is a whole number, 1 or more, got 0.5"),
        ({"tuning_mode": "lora", "target_modules": []}, "target_modules names at least one layer"),
        ({"num_labels": 2}, "num_labels is .* for sequence classification only; got 2"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoDistributedModelForCausalLM.from_pretrained("no such model", peers=["nobody"], **options)


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (["q_proj", "wq"], "no layer of a llama model is called 'wq'; its blocks have mlp.down_proj, .*q_proj"),
        (["lm_head"], "'lm_head' matches lm_head, a Linear; only linear layers of blocks are tuned: mlp.down_proj"),
        (["input_layernorm"], "matches model.layers.0.input_layernorm, a LlamaRMSNorm; only linear layers"),
        ("(", "is no regular expression"),
    ],
)
def test_target_modules_must_be_linear_layers_of_blocks(family_of: FamilyOf, target_modules: Any, message: str) -> None:
    with (
        pytest.raises(ConfigError, match=message),
        family_of("llama").tuned(tuning_mode="lora", target_modules=target_modules),
    ):
        pass


def test_architectures_that_peft_does_not_know_need_target_modules(family_of: FamilyOf) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"no layers of a olmo2 model by default: name target_modules, of mlp\.down_proj"
        ),
        family_of("olmo2").tuned(tuning_mode="lora"),
    ):
        pass
    with family_of("olmo2").tuned(tuning_mode="lora", target_modules=["q_proj"]) as model:
        assert len(model.tuning.pairs) == 8


def test_a_model_that_is_not_tuned_has_nothing_to_save(family_of: FamilyOf, tmp_path: Path) -> None:
    with family_of("llama").swarm() as (model, _), pytest.raises(ConfigError, match="load it with a tuning_mode"):
        model.save_pretrained(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


class Saved:
    """A folder of a tuned tiny llama, to be changed by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def configure(self, **changes: Any) -> None:
        path = self.folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def change(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        path = self.folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


@pytest.fixture(scope="module")
def originals(family_of: FamilyOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("originals")
    for mode in ("ptune", "deep_ptune", "lora"):
        with family_of("llama").tuned(Head.SEQUENCE_CLASSIFICATION, tuning_mode=mode, pre_seq_len=4) as model:
            model.save_pretrained(home / f"{mode}-classifier")
        with family_of("llama").tuned(tuning_mode=mode, pre_seq_len=4) as model:
            model.save_pretrained(home / mode)
    return home


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ptune", lambda saved: saved.configure(num_virtual_tokens=5), r"has the shape \[4, 64\], .* want \[5, 64\]"),
        ("ptune", lambda saved: saved.configure(peft_type="PREFIX_TUNING"), "type PREFIX_TUNING; LORA, PROMPT_TUNING"),
        ("ptune", lambda saved: saved.configure(peft_type="DEEP_PROMPT_TUNING"), r"holds \['prompt_embeddings'\]"),
        ("ptune", lambda saved: saved.configure(num_transformer_submodules=2), "for an encoder and a decoder"),
        ("ptune", lambda saved: saved.change(lambda t: t["prompt_embeddings"].fill_(torch.nan)), "not finite"),
        (
            "deep_ptune",
            lambda saved: saved.change(lambda t: t.update(deep_prompt_embeddings=torch.zeros(7, 4, 64))),
            r"\[7, 4, 64\], .* want \[8, 4, 64\]",
        ),
        ("lora", lambda saved: saved.configure(r=3), r"has the shape \[8, 64\], this model and rank 3 want \[3, 64\]"),
        ("lora", lambda saved: saved.configure(use_dora=True), "use_dora = True, which is not supported"),
        (
            "lora-classifier",
            lambda saved: None,
            "was trained with score.weight, which a LlamaForCausalLM does not have",
        ),
        ("ptune-classifier", lambda saved: None, "was trained with score.weight, which a LlamaForCausalLM does not"),
    ],
)
def test_folders_that_do_not_fit_are_refused_and_the_model_goes_on(
    family_of: FamilyOf, originals: Path, name: str, change: Callable[[Saved], None], message: str, tmp_path: Path
) -> None:
    saved = Saved(shutil.copytree(originals / name, tmp_path / "saved"))
    change(saved)
    with family_of("llama").swarm() as (model, _):
        with pytest.raises(CheckpointError, match=message):
            model.load_tuning(saved.folder)
        with pytest.raises(CheckpointError, match=message):
            model.inference_session(max_length=20, adapter=saved.folder)
        assert model.generate(PADLESS, max_new_tokens=2, do_sample=False).shape == (1, 8)


def test_lora_for_layers_of_another_architecture_is_refused(family_of: FamilyOf, originals: Path) -> None:
    with (
        family_of("gpt2").swarm() as (model, _),
        pytest.raises(CheckpointError, match=r"which is in none of the blocks transformer\.h\.0"),
    ):
        model.load_tuning(originals / "lora")


def test_a_prompt_of_the_right_size_for_another_model_is_told_of(
    family_of: FamilyOf, originals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with family_of("gpt2").swarm() as (model, _):
        model.load_tuning(originals / "ptune")
    (record,) = (record for record in caplog.records if "was tuned for" in record.getMessage())
    assert "tiny-llama@" in record.getMessage()
    assert "used with tiny-gpt2@" in record.getMessage()


def test_dropout_is_refused_where_it_would_be_trained_and_nowhere_else(
    family_of: FamilyOf, originals: Path, tmp_path: Path
) -> None:
    saved = Saved(shutil.copytree(originals / "lora", tmp_path / "saved"))
    saved.configure(lora_dropout=0.1)
    with family_of("llama").swarm() as (model, _):
        with pytest.raises(ConfigError, match=r"lora_dropout 0\.1, which servers do not apply"):
            model.load_tuning(saved.folder)
        with model.inference_session(max_length=20, adapter=saved.folder):
            model.generate(PADLESS, max_new_tokens=2, do_sample=False)


def test_a_head_for_other_labels_is_refused(family_of: FamilyOf, originals: Path, tmp_path: Path) -> None:
    saved = Saved(shutil.copytree(originals / "lora-classifier", tmp_path / "saved"))
    saved.change(lambda tensors: tensors.update({"base_model.model.score.weight": torch.zeros(5, 64)}))
    with (
        family_of("llama").tuned(Head.SEQUENCE_CLASSIFICATION) as model,
        pytest.raises(ConfigError, match=r"score\.weight is for 5 labels, this model has 3"),
    ):
        model.load_tuning(saved.folder)


@pytest.mark.parametrize(
    "auto", [AutoDistributedModel, AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification]
)
def test_auto_classes_have_no_instances(auto: Any) -> None:
    with pytest.raises(TypeError, match=f"use {auto.__name__}.from_pretrained"):
        auto()
