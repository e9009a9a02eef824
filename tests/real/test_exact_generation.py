"""A real model over three server processes gives the local model's tokens: the proof that the whole path is exact."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_servers import invited_to

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.portal import Portal
from p2pswarm.core.span import Span
from p2pswarm.models.auto import AutoDistributedModelForCausalLM
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm
from swarm_cli.sample_model import sample_model

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "The three laws of thermodynamics are",
    "Ingredients: two eggs, flour, milk.",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam, I am writing to",
    "Why is the sky blue?",
)
TURNS = ("What is the capital of Italy?", "And of Spain?", "Which of the two is larger?")
GREEDY: dict[str, Any] = {"do_sample": False}


@dataclass(frozen=True)
class World:
    distributed: Any
    local: Any
    tokenizer: Any

    def encode(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def world(swarm_key_path: Path | None) -> Iterator[World]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the servers: sums are then made in the same order
    path = sample_model()
    plan = LocalSwarmPlan(path, (Span(0, 10), Span(10, 20), Span(20, 30)), threads=1, swarm_key=swarm_key_path)
    with Portal() as portal:
        servers = portal.enter(local_swarm(plan)).value
        peers = invited_to(servers[0].addresses, swarm_key_path)
        config = ClientConfig(known_peers_path=None)
        with AutoDistributedModelForCausalLM.from_pretrained(path, peers=peers, config=config) as distributed:
            checkpoint = open_checkpoint(path)
            yield World(distributed, load_local_model(checkpoint), checkpoint.tokenizer())
    torch.set_num_threads(threads_before)


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS[0:2],
        PROMPTS[2:4],
        pytest.param(PROMPTS[4:6], marks=pytest.mark.exhaustive),
        pytest.param(PROMPTS[6:8], marks=pytest.mark.exhaustive),
    ],
)
def test_greedy_tokens_of_eight_prompts_two_at_a_time(world: World, prompts: tuple[str, ...]) -> None:
    def both(prompt: str) -> tuple[list[int], list[int]]:
        token_ids = world.encode(prompt)
        options = GREEDY | {"max_new_tokens": 128, "min_new_tokens": 128}
        return tuple(model.generate(token_ids, **options)[0].tolist() for model in (world.distributed, world.local))

    with ThreadPoolExecutor(2) as threads:
        for got, expected in threads.map(both, prompts):
            assert got == expected
            assert len(got) > 128


def test_sampling_with_a_fixed_seed(world: World) -> None:
    token_ids = world.encode(PROMPTS[1])
    results = []
    for model in (world.distributed, world.local):
        torch.manual_seed(1234)
        results.append(
            model.generate(token_ids, do_sample=True, temperature=0.9, top_p=0.95, max_new_tokens=40).tolist()
        )
    assert results[0] == results[1]


def test_batch_of_four_prompts_of_different_lengths(world: World) -> None:
    world.tokenizer.padding_side = "left"
    world.tokenizer.pad_token = world.tokenizer.pad_token or world.tokenizer.eos_token
    batch = world.tokenizer(list(PROMPTS[:4]), return_tensors="pt", padding=True)
    assert (batch["attention_mask"] == 0).any()
    options = GREEDY | {"max_new_tokens": 32, "attention_mask": batch["attention_mask"]}
    got, expected = (model.generate(batch["input_ids"], **options) for model in (world.distributed, world.local))
    assert got.tolist() == expected.tolist()


def test_chat_of_three_turns_in_one_session(world: World) -> None:
    text = torch.empty(1, 0, dtype=torch.long)
    with world.distributed.inference_session(max_length=512) as session:
        for turn in TURNS:
            message = [{"role": "user", "content": turn}]
            said = world.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")
            said = said if isinstance(said, torch.Tensor) else said["input_ids"]
            answer = world.distributed.generate(said, max_new_tokens=24, **GREEDY)
            text = torch.cat([text, said], dim=1)
            expected = world.local.generate(text, max_new_tokens=24, **GREEDY)
            assert answer[0, said.shape[1] :].tolist() == expected[0, text.shape[1] :].tolist()
            text = expected
            assert session.position == text.shape[1] - 1


def test_rollback_by_position(world: World) -> None:
    token_ids = world.encode(PROMPTS[0])
    start = token_ids.shape[1]
    with world.distributed.inference_session(max_length=128) as session:
        first = world.distributed.generate(token_ids, max_new_tokens=20, **GREEDY)
        session.position = start + 5
        again = world.distributed.generate(max_new_tokens=15, **GREEDY)
        assert again[0].tolist() == first[0, start + 5 :].tolist()
        session.position = start
        other = world.distributed.generate(world.encode(" not"), max_new_tokens=15, **GREEDY)
    whole = torch.cat([token_ids, world.encode(" not")], dim=1)
    expected = world.local.generate(whole, max_new_tokens=15, **GREEDY)
    assert other[0].tolist() == expected[0, start:].tolist()


def test_beam_search(world: World) -> None:
    token_ids = world.encode(PROMPTS[3])
    options = {"num_beams": 4, "max_new_tokens": 24, "do_sample": False}
    got, expected = (model.generate(token_ids, **options) for model in (world.distributed, world.local))
    assert got.tolist() == expected.tolist()


@torch.inference_mode()
def test_logits_agree_within_a_ten_thousandth(world: World) -> None:
    token_ids = world.encode(" ".join(PROMPTS))
    got = world.distributed(token_ids, use_cache=False).logits
    torch.testing.assert_close(got, world.local(token_ids).logits, rtol=0, atol=1e-4)
