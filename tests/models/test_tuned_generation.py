"""Texts with a tuned prompt or adapter: sessions count the text's tokens only, and all ways to a token are one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned_models import MASK, PADLESS, TOKENS, Family, as_if_trained, families, with_peft, without_pefts_warnings

from p2pswarm.blocks.client_model import SwarmCache
from p2pswarm.core.errors import CheckpointError, ConfigError

NUM_VIRTUAL = 5
GREEDY = {"do_sample": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "ptune": {"tuning_mode": "ptune", "pre_seq_len": NUM_VIRTUAL},
    "deep_ptune": {"tuning_mode": "deep_ptune", "pre_seq_len": NUM_VIRTUAL},
    "lora": {"tuning_mode": "lora", "lora_rank": 3},
}
MODES = sorted(OPTIONS)
FamilyOf = Callable[[str], Family]


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> FamilyOf:
    return families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def folders(family_of: FamilyOf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved tunings of the tiny llama."""
    home = tmp_path_factory.mktemp("tunings")
    for mode, options in OPTIONS.items():
        with family_of("llama").tuned(**options) as model:
            as_if_trained(model)
            model.save_pretrained(home / mode)
    return {mode: home / mode for mode in OPTIONS}


@pytest.fixture(params=MODES)
def tuned(request: pytest.FixtureRequest, family_of: FamilyOf) -> Iterator[Any]:
    with family_of("llama").tuned(**OPTIONS[request.param]) as model:
        as_if_trained(model)
        yield model


def without_cache(model: Any, text: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The whole text anew for each token: no session, no positions to go wrong."""
    mask = torch.ones_like(text)  # also where a model happens to say what pads are written with
    return model.generate(text, attention_mask=mask, max_new_tokens=num_tokens, use_cache=False, **GREEDY)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "opt", "gemma2"])
@pytest.mark.parametrize("mode", ["lora", "ptune"])
def test_generates_what_peft_does(family_of: FamilyOf, model_type: str, mode: str, tmp_path: Path) -> None:
    family = family_of(model_type)
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    with family.tuned(**OPTIONS[mode]) as model:
        as_if_trained(model, size=0.1)
        model.save_pretrained(tmp_path)
        got = model.generate(PADLESS, **options)
    with without_pefts_warnings():
        expected = with_peft(family.local(), tmp_path).generate(input_ids=PADLESS, **options)
    plain = family.local().generate(PADLESS, **options)
    assert got.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    assert (got.logits[0] - plain.logits[0]).abs().max() > 0.1


def test_padded_rows_say_what_they_say_alone(tuned: Any) -> None:
    together = tuned.generate(TOKENS, attention_mask=MASK, max_new_tokens=6, **GREEDY)
    for row, mask, got in zip(TOKENS, MASK, together, strict=True):
        alone = without_cache(tuned, row[mask.bool()][None], 6)
        assert got[-6:].tolist() == alone[0, -6:].tolist()


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom"])
def test_padded_rows_of_models_with_other_positions_do_too(family_of: FamilyOf, model_type: str) -> None:
    with family_of(model_type).tuned(**OPTIONS["ptune"]) as model:
        as_if_trained(model)
        together = model.generate(TOKENS, attention_mask=MASK, max_new_tokens=6, **GREEDY)
        for row, mask, got in zip(TOKENS, MASK, together, strict=True):
            alone = without_cache(model, row[mask.bool()][None], 6)
            assert got[-6:].tolist() == alone[0, -6:].tolist()


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_beams_and_samples_are_those_without_a_cache(tuned: Any, options: dict[str, Any]) -> None:
    results = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        results.append(tuned.generate(PADLESS, max_new_tokens=6, use_cache=use_cache, **GREEDY | options).tolist())
    assert results[0] == results[1]


def test_a_session_of_several_turns_goes_on_and_goes_back(tuned: Any) -> None:
    expected = without_cache(tuned, PADLESS, 5)
    more = torch.tensor([[8, 9]])
    longer = without_cache(tuned, torch.cat([expected, more], dim=1), 4)
    two_rows = torch.cat([PADLESS, PADLESS.flip(1)])
    of_two_rows = without_cache(tuned, two_rows, 4)
    with tuned.inference_session(max_length=longer.shape[1]) as session:
        assert tuned.generate(PADLESS, max_new_tokens=5, **GREEDY).tolist() == expected.tolist()
        assert session.position == expected.shape[1] - 1
        assert tuned.generate(more, max_new_tokens=4, **GREEDY).tolist() == longer[:, -6:].tolist()
        assert session.token_ids.tolist() == longer.tolist()

        session.position = 8
        assert tuned.generate(max_new_tokens=3, **GREEDY).tolist() == expected[:, 8:11].tolist()
        session.position = 0
        assert tuned.generate(two_rows, max_new_tokens=4, **GREEDY).tolist() == of_two_rows.tolist()
        session.position = 0
        with pytest.raises(ConfigError, match=f"0 tokens and {longer.shape[1] + 1} new ones .* max_length 17"):
            tuned(torch.full((1, longer.shape[1] + 1), 5), past_key_values=SwarmCache())


def test_a_session_keeps_the_tuning_it_began_with(family_of: FamilyOf) -> None:
    with family_of("llama").tuned(**OPTIONS["deep_ptune"]) as model:
        as_if_trained(model)
        before = without_cache(model, PADLESS, 8)
        with model.inference_session(max_length=40):
            model.generate(PADLESS, max_new_tokens=2, **GREEDY)
            as_if_trained(model, seed=4)
            rest = model.generate(max_new_tokens=6, **GREEDY)
        assert rest[:, -6:].tolist() == before[:, -6:].tolist()
        assert without_cache(model, PADLESS, 8).tolist() != before.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_is_carried_along_by_sessions_and_no_others(
    family_of: FamilyOf, folders: dict[str, Path], mode: str
) -> None:
    family = family_of("llama")
    with family.tuned(**OPTIONS[mode]) as model:
        as_if_trained(model)
        expected = without_cache(model, PADLESS, 6)
    with family.swarm() as (model, _):
        plain = model.generate(PADLESS, max_new_tokens=6, **GREEDY)
        with model.inference_session(max_length=30, adapter=folders[mode]):
            assert model.generate(PADLESS, max_new_tokens=6, **GREEDY).tolist() == expected.tolist()
            logits = model(PADLESS, use_cache=False).logits
        assert logits[0, -1].argmax() == expected[0, PADLESS.shape[1]]
        assert plain.tolist() == model.generate(PADLESS, max_new_tokens=6, **GREEDY).tolist() != expected.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_loads_a_tuning_says_what_the_saved_one_did(
    family_of: FamilyOf, folders: dict[str, Path], mode: str
) -> None:
    family = family_of("llama")
    with family.swarm() as (model, _):
        with model.inference_session(max_length=30, adapter=folders[mode]):
            expected = model.generate(PADLESS, max_new_tokens=6, **GREEDY)
        model.load_tuning(folders[mode])
        assert model.generate(PADLESS, max_new_tokens=6, **GREEDY).tolist() == expected.tolist()


def test_hidden_states_are_refused_by_a_session_with_a_prompt(family_of: FamilyOf, folders: dict[str, Path]) -> None:
    with family_of("llama").swarm() as (model, _):
        states = model.get_input_embeddings()(PADLESS)
        with (
            model.inference_session(max_length=30, adapter=folders["ptune"]) as session,
            pytest.raises(ConfigError, match="takes tokens"),
        ):
            session.step(states)


def test_a_folder_of_another_model_is_refused_by_name(family_of: FamilyOf, folders: dict[str, Path]) -> None:
    with family_of("gpt2").swarm() as (model, _):
        with pytest.raises(CheckpointError, match=r"lora@.*model.layers.0.self_attn"):
            model.inference_session(max_length=30, adapter=folders["lora"])
        assert model.generate(PADLESS, max_new_tokens=2, **GREEDY).shape == (1, 8)
