"""What was tuned goes along with a client's calls: two server processes that know nothing of it, and whoever has its
folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_servers import TinyServers
from tuned_models import MASK, PADLESS, TOKENS, as_if_trained, with_peft, without_pefts_warnings

from p2pswarm.client.config import ClientConfig
from p2pswarm.models.auto import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)

pytestmark = [pytest.mark.real, pytest.mark.slow]

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}


def load(auto: Any, servers: TinyServers, **options: Any) -> Any:
    config = ClientConfig(known_peers_path=None)
    return auto.from_pretrained(servers.model, peers=list(servers.peers), config=config, **options)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune", "lora"])
def test_a_folder_generates_the_same_by_every_way_in(tiny_servers: TinyServers, mode: str, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    with load(AutoDistributedModelForCausalLM, tiny_servers, tuning_mode=mode, pre_seq_len=4) as model:
        as_if_trained(model)
        model.save_pretrained(folder)
        expected = model.generate(PADLESS, **GREEDY).tolist()
        words = model.tokenizer.decode(PADLESS[0])
    if mode != "deep_ptune":
        from transformers import AutoModelForCausalLM

        peft = with_peft(AutoModelForCausalLM.from_pretrained(tiny_servers.model), folder)
        with without_pefts_warnings():
            assert peft.generate(input_ids=PADLESS, **GREEDY).tolist() == expected
    with load(AutoDistributedModelForCausalLM, tiny_servers, active_adapter=folder) as model:
        assert model.generate(PADLESS, **GREEDY).tolist() == expected
        assert model.generate(PADLESS, use_cache=False, **GREEDY).tolist() == expected
    assert from_command_line(tiny_servers, words, folder) == expected[0][PADLESS.shape[1] :]


def from_command_line(servers: TinyServers, prompt: str, adapter: Path) -> list[int]:
    options = ["--adapter", str(adapter), "--max-new-tokens", "8", "--temperature", "0", "--json"]
    done = servers.run("generate", servers.model, prompt, *options)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["token_ids"])


def test_a_classifier_comes_back_with_its_head_and_labels(tiny_servers: TinyServers, tmp_path: Path) -> None:
    auto = AutoDistributedModelForSequenceClassification
    with load(auto, tiny_servers, tuning_mode="lora", num_labels=5) as model, torch.no_grad():
        as_if_trained(model)
        model.save_pretrained(tmp_path)
        expected = model(TOKENS, attention_mask=MASK).logits
    with load(auto, tiny_servers, active_adapter=tmp_path) as model, torch.no_grad():
        torch.testing.assert_close(model(TOKENS, attention_mask=MASK).logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == (3, 5)


def test_a_model_without_a_head_gives_hidden_states(tiny_servers: TinyServers) -> None:
    from transformers import AutoModel

    local = AutoModel.from_pretrained(tiny_servers.model)
    with load(AutoDistributedModel, tiny_servers) as model, torch.no_grad():
        got, expected = (each(TOKENS, attention_mask=MASK).last_hidden_state for each in (model, local))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
