"""What was tuned goes along with a client's calls: two server processes that know nothing of it, and whoever has its
folder."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned_models import MASK, PADLESS, TOKENS, as_if_trained, with_peft, without_pefts_warnings

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.portal import Portal
from p2pswarm.core.span import Span
from p2pswarm.models.auto import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm

pytestmark = [pytest.mark.real, pytest.mark.slow]

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
TIMEOUT_S = 120


@dataclass(frozen=True)
class World:
    model: str
    peers: list[str]

    def load(self, auto: Any, **options: Any) -> Any:
        return auto.from_pretrained(self.model, peers=self.peers, config=ClientConfig(known_peers_path=None), **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "llama", eos_token_id=None)
    save_tiny_tokenizer(folder)
    with Portal() as portal:
        servers = portal.enter(local_swarm(LocalSwarmPlan(str(folder), (Span(0, 3), Span(3, 8)), threads=1))).value
        yield World(str(folder), list(servers[0].addresses))


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune", "lora"])
def test_a_folder_generates_the_same_by_every_way_in(world: World, mode: str, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    with world.load(AutoDistributedModelForCausalLM, tuning_mode=mode, pre_seq_len=4) as model:
        as_if_trained(model)
        model.save_pretrained(folder)
        expected = model.generate(PADLESS, **GREEDY).tolist()
        words = model.tokenizer.decode(PADLESS[0])
    if mode != "deep_ptune":
        from transformers import AutoModelForCausalLM

        peft = with_peft(AutoModelForCausalLM.from_pretrained(world.model), folder)
        with without_pefts_warnings():
            assert peft.generate(input_ids=PADLESS, **GREEDY).tolist() == expected
    with world.load(AutoDistributedModelForCausalLM, active_adapter=folder) as model:
        assert model.generate(PADLESS, **GREEDY).tolist() == expected
        assert model.generate(PADLESS, use_cache=False, **GREEDY).tolist() == expected
    assert from_command_line(world, words, folder, tmp_path) == expected[0][PADLESS.shape[1] :]


def from_command_line(world: World, prompt: str, adapter: Path, home: Path) -> list[int]:
    words = ["generate", world.model, prompt, "--adapter", str(adapter), "--max-new-tokens", "8", "--temperature", "0"]
    finished = subprocess.run(
        [sys.executable, "-m", "swarm_cli", *words, "--json", "--peers", *world.peers],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=os.environ | {"XDG_CACHE_HOME": str(home / "cache")},
    )
    assert finished.returncode == 0, finished.stderr
    return list(json.loads(finished.stdout)["token_ids"])


def test_a_classifier_comes_back_with_its_head_and_labels(world: World, tmp_path: Path) -> None:
    auto = AutoDistributedModelForSequenceClassification
    with world.load(auto, tuning_mode="lora", num_labels=5) as model, torch.no_grad():
        as_if_trained(model)
        model.save_pretrained(tmp_path)
        expected = model(TOKENS, attention_mask=MASK).logits
    with world.load(auto, active_adapter=tmp_path) as model, torch.no_grad():
        torch.testing.assert_close(model(TOKENS, attention_mask=MASK).logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == (3, 5)


def test_a_model_without_a_head_gives_hidden_states(world: World) -> None:
    from transformers import AutoModel

    local = AutoModel.from_pretrained(world.model)
    with world.load(AutoDistributedModel) as model, torch.no_grad():
        got, expected = (each(TOKENS, attention_mask=MASK).last_hidden_state for each in (model, local))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
