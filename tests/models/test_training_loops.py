"""transformers' Trainer and plain PyTorch train through the swarm; what they write is small, and training goes on from
it as if it had never stopped."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned_models import MASK, TOKENS, Family, families, with_peft

from p2pswarm.blocks.architecture import Head

NUM_STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "ptune": {"tuning_mode": "ptune", "pre_seq_len": 4},
    "deep_ptune": {"tuning_mode": "deep_ptune", "pre_seq_len": 4},
    "lora": {"tuning_mode": "lora", "lora_rank": 3},
}
MAX_CHECKPOINT_BYTES = 200_000
FamilyOf = Callable[[str], Family]


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> FamilyOf:
    return families(tmp_path_factory.mktemp("families"))


def rows(head: Head) -> list[dict[str, Any]]:
    """Each padded text several times, with what is to be learnt of it."""
    texts = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(TOKENS, MASK, strict=True)]
    if head is Head.CAUSAL_LM:
        labelled = [
            {**text, "labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)} for text in texts
        ]
    else:
        labelled = [{**text, "labels": torch.tensor(number)} for number, text in enumerate(texts)]
    return labelled * 4


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers and torch say of their own machinery."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory")
        yield


def trainer(model: Any, folder: Path, head: Head, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.05,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    arguments = TrainingArguments(str(folder), **settings | options)
    return Trainer(model=model, args=arguments, train_dataset=rows(head), eval_dataset=rows(head)[:3])


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("model_type", "mode", "head"),
    [
        ("llama", "ptune", Head.SEQUENCE_CLASSIFICATION),
        ("llama", "deep_ptune", Head.CAUSAL_LM),
        ("llama", "lora", Head.CAUSAL_LM),
        ("gpt2", "lora", Head.SEQUENCE_CLASSIFICATION),
    ],
)
def test_trainer_learns_and_resumes_as_if_it_had_not_stopped(
    family_of: FamilyOf, model_type: str, mode: str, head: Head, tmp_path: Path
) -> None:
    family = family_of(model_type)
    with family.tuned(head, **OPTIONS[mode]) as model:
        whole = trainer(model, tmp_path / "run", head)
        whole.train()
        evaluated = whole.evaluate()["eval_loss"]
    assert losses(whole)[-1] < 0.9 * losses(whole)[0]
    checkpoint = tmp_path / "run" / "checkpoint-4"
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    assert sizes.keys() >= {"adapter_model.safetensors", "adapter_config.json", "model.safetensors", "optimizer.pt"}
    assert sum(sizes.values()) < MAX_CHECKPOINT_BYTES

    with family.tuned(head, **OPTIONS[mode], seed=99) as model:
        resumed = trainer(model, tmp_path / "run", head)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], abs=1e-5)
        assert resumed.evaluate()["eval_loss"] == pytest.approx(evaluated, abs=1e-5)


def test_trainer_finds_all_that_it_saved_and_takes_the_best(
    family_of: FamilyOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.utils import logging

    steps = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    options = {**steps, "greater_is_better": True}  # so that it is not the last one
    with family_of("llama").tuned(Head.SEQUENCE_CLASSIFICATION, **OPTIONS["ptune"]) as model:
        run = trainer(model, tmp_path / "run", Head.SEQUENCE_CLASSIFICATION, **options)
        logging.enable_propagation()
        try:
            run.train()
        finally:
            logging.disable_propagation()
        best = run.state.best_metric
        assert run.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)
        assert best == max(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
        assert run.state.best_global_step < NUM_STEPS
        run.save_model(str(tmp_path / "best"))
    assert not [record for record in caplog.records if "keys" in record.getMessage()]
    with family_of("llama").tuned(Head.SEQUENCE_CLASSIFICATION) as model:
        model.load_tuning(tmp_path / "best")
        again = trainer(model, tmp_path / "again", Head.SEQUENCE_CLASSIFICATION)
        assert again.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)


def train(model: Any, num_steps: int, optimizer: torch.optim.Optimizer, head: Head = Head.CAUSAL_LM) -> list[float]:
    """A plain loop over one batch; its losses."""
    batch = {name: torch.stack([row[name] for row in rows(head)[:3]]) for name in rows(head)[0]}
    seen = []
    for _ in range(num_steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_a_plain_loop_has_the_losses_of_peft_on_one_machine(
    family_of: FamilyOf, model_type: str, tmp_path: Path
) -> None:
    family = family_of(model_type)
    with family.tuned(**OPTIONS["lora"]) as model:
        model.save_pretrained(tmp_path)
        got = train(model.train(), 20, optimizer_of(model))
    peft = with_peft(family.local(), tmp_path)
    expected = train(peft, 20, optimizer_of(peft))
    assert got == pytest.approx(expected, abs=1e-3)
    assert got[-1] < 0.8 * got[0]


@pytest.mark.parametrize("mode", sorted(OPTIONS))
def test_a_plain_loop_goes_on_from_what_was_saved_with_the_optimizer_that_it_has(
    family_of: FamilyOf, mode: str, tmp_path: Path
) -> None:
    with family_of("llama").tuned(**OPTIONS[mode]) as model:
        optimizer = optimizer_of(model)
        train(model, 2, optimizer)
        model.save_pretrained(tmp_path)
        state = copy.deepcopy(optimizer.state_dict())
        expected = train(model, 3, optimizer)
    with family_of("llama").tuned(**OPTIONS[mode], seed=99) as model:
        optimizer = optimizer_of(model)
        model.load_tuning(tmp_path)
        optimizer.load_state_dict(state)
        assert train(model, 3, optimizer) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("head", [Head.CAUSAL_LM, Head.SEQUENCE_CLASSIFICATION])
def test_all_but_the_tuning_and_the_new_head_is_frozen_and_drops_nothing_out(family_of: FamilyOf, head: Head) -> None:
    with family_of("gpt2").tuned(head, **OPTIONS["deep_ptune"]) as model:
        frozen = {
            name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad
        }
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        heads = {"score.weight"} if head is Head.SEQUENCE_CLASSIFICATION else set()
        assert trained == {"tuning.prompts", "tuning.deep_prompts"} | heads
        assert {parameter.dtype for name, parameter in model.named_parameters() if name in trained} == {torch.float32}
        model.train()
        first = train(model, 1, torch.optim.SGD([model.tuning.prompts], lr=0.0), head)
        assert model.training
        assert first == train(model, 1, torch.optim.SGD([model.tuning.prompts], lr=0.0), head)
        train(model, 2, optimizer_of(model), head)
        for name, parameter in model.named_parameters():
            assert name in trained or parameter.equal(frozen[name])
