"""What is tuned through the swarm computes what peft computes with it on one machine, and learns the same from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned_models import MASK, TOKENS, Family, as_if_trained, families, with_peft

from p2pswarm.blocks.architecture import Head

NUM_VIRTUAL = 5
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MODEL_TYPES = ("llama", "gpt2", "bloom", "gemma2")
"""By rotary positions, learned ones, and none but a bias; the last one scales embeddings."""
FamilyOf = Callable[[str], Family]


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> FamilyOf:
    return families(tmp_path_factory.mktemp("families"))


def values_of(output: Any) -> torch.Tensor:
    return output.last_hidden_state if "last_hidden_state" in output else output.logits


def go_back(values: torch.Tensor) -> None:
    """Leaves the gradients of a sum to which each value adds something else."""
    (values * torch.linspace(-1.0, 1.0, values.numel()).view_as(values)).sum().backward()


def check_gradients(model: Any, peft: Any) -> None:
    """Each parameter that is trained has the gradient of its counterpart."""
    expected = {name: parameter.grad for name, parameter in peft.named_parameters() if parameter.requires_grad}
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(got) == len(expected)
    for name, gradient in got.items():
        part = part_of_pefts_name(name)
        (counterpart,) = (value for other, value in expected.items() if part in other)
        bound = 1e-4 * float(counterpart.abs().max())
        torch.testing.assert_close(
            gradient, counterpart, rtol=1e-4, atol=bound, msg=lambda text, name=name: name + text
        )


def part_of_pefts_name(name: str) -> str:
    match name.split("."):
        case ["tuning", "pairs", key, side]:
            return f".{key.replace('-', '.')}.lora_{'A' if side == 'down' else 'B'}."
        case ["tuning", "prompts"]:
            return "prompt_encoder"
        case [head, "weight"]:
            return f"{head}.modules_to_save"
    raise AssertionError(name)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("head", [Head.CAUSAL_LM, Head.SEQUENCE_CLASSIFICATION, Head.NONE])
def test_lora_has_the_values_and_gradients_of_pefts(
    family_of: FamilyOf, model_type: str, head: Head, tmp_path: Path
) -> None:
    with family_of(model_type).tuned(head, tuning_mode="lora", lora_rank=3, lora_alpha=7) as model:
        as_if_trained(model)
        model.save_pretrained(tmp_path)
        peft = with_peft(family_of(model_type).local(head), tmp_path)
        got, expected = (values_of(each(TOKENS, attention_mask=MASK)) for each in (model, peft))
        torch.testing.assert_close(got, expected, **CLOSE)
        go_back(got)
        go_back(expected)
        check_gradients(model, peft)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("head", [Head.CAUSAL_LM, Head.SEQUENCE_CLASSIFICATION, Head.NONE])
def test_prompt_tuning_has_the_values_and_gradients_of_pefts(
    family_of: FamilyOf, model_type: str, head: Head, tmp_path: Path
) -> None:
    with family_of(model_type).tuned(head, tuning_mode="ptune", pre_seq_len=NUM_VIRTUAL) as model:
        as_if_trained(model)
        model.save_pretrained(tmp_path)
        peft = with_peft(family_of(model_type).local(head), tmp_path)
        got = values_of(model(TOKENS, attention_mask=MASK))
        expected = values_of(peft(input_ids=TOKENS, attention_mask=MASK))
        if head is not Head.SEQUENCE_CLASSIFICATION:
            expected = expected[:, NUM_VIRTUAL:]
        torch.testing.assert_close(got, expected, **CLOSE)
        go_back(got)
        go_back(expected)
        check_gradients(model, peft)


def test_a_loss_by_labels_is_pefts_but_for_the_first_token(family_of: FamilyOf, tmp_path: Path) -> None:
    """As without a prompt, nothing is learnt from the first token of a text: peft predicts it from the prompt."""
    labels = TOKENS.masked_fill(MASK == 0, -100)
    labels[:, 0] = -100
    with family_of("llama").tuned(tuning_mode="ptune", pre_seq_len=NUM_VIRTUAL) as model:
        model.save_pretrained(tmp_path)
        peft = with_peft(family_of("llama").local(), tmp_path)
        got, expected = (each(input_ids=TOKENS, attention_mask=MASK, labels=labels).loss for each in (model, peft))
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}, {"alpha_pattern": {"q_proj": 3}}]
)
def test_scales_and_ranks_of_pefts_own_adapters_are_kept_when_they_are_trained_further(
    family_of: FamilyOf, options: dict[str, Any], tmp_path: Path
) -> None:
    from tiny_adapters import save_adapter

    family = family_of("llama")
    adapter = save_adapter(tmp_path / "peft's", family.local(), seed=1, target_modules=["q_proj", "v_proj"], **options)
    with family.swarm() as (model, _):
        model.load_tuning(adapter)
        as_if_trained(model)
        model.save_pretrained(tmp_path / "ours")
        expected = with_peft(family.local(), tmp_path / "ours")(TOKENS, attention_mask=MASK).logits
        torch.testing.assert_close(model(TOKENS, attention_mask=MASK).logits, expected, **CLOSE)


def test_targets_are_those_of_peft(family_of: FamilyOf) -> None:
    from peft import LoraConfig, get_peft_model
    from tuned_models import without_pefts_warnings

    family = family_of("llama")
    for wanted in (
        None,
        ["q_proj", "mlp.up_proj"],
        r".*\.[0-3]\.mlp\.(gate|up)_proj",
        "all-linear",
        ["layers.3.self_attn.k_proj"],
    ):
        with without_pefts_warnings():
            peft = get_peft_model(family.local(), LoraConfig(target_modules=wanted, task_type="CAUSAL_LM"))
        expected = {name.split(".lora_A")[0] for name, _ in peft.named_parameters() if ".lora_A" in name}
        with family.tuned(tuning_mode="lora", target_modules=wanted) as model:
            saved = {
                name.split(".lora_A")[0] for name in model.tuning.saved_tensors("model.layers") if ".lora_A" in name
            }
        assert saved == expected
