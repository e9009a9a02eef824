"""Text stays the local model's, token for token, while the servers that make it die one after the other."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
import trio
from tiny_swarm import SPANS, TinySwarm

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.generation import GeneratingSession
from p2pswarm.core.errors import MissingBlocksError

PROMPT = [5, 17, 99, 3, 42]
GREEDY: dict[str, Any] = {"do_sample": False}
NUM_REPLICAS = 5
STEPS_BETWEEN_KILLS = 4
POLL_S = 0.001


@asynccontextmanager
async def dying_servers(world: TinySwarm, session: GeneratingSession) -> AsyncIterator[list[str]]:
    """Every few steps one of the session's servers is killed, as long as its span has another one; who was killed."""
    killed: list[str] = []
    randomness = random.Random(1)

    async def kill() -> None:
        position = session.position
        while True:
            await trio.sleep(POLL_S)
            if session.route is None or abs(session.position - position) < STEPS_BETWEEN_KILLS:
                continue
            position = session.position
            hops = [hop for hop in session.route.hops if hop.peer_id not in killed]
            living = [world.view.servers[peer_id].span for peer_id in world.view.servers if peer_id not in killed]
            spare = [hop.peer_id for hop in hops if living.count(hop.span) > 1]
            if spare:
                killed.append(randomness.choice(spare))
                world.memory.kill(killed[-1])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill)
        yield killed
        nursery.cancel_scope.cancel()


def local_tokens(local: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """With every token of the prompt meant as one: left to itself, transformers takes token 0 for padding."""
    token_ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(token_ids), "max_new_tokens": num_tokens}
    return local.generate(token_ids, **options, **GREEDY)[0, len(prompt) :].tolist()


async def test_streamed_tokens_are_the_local_models_while_servers_die(open_world, local) -> None:
    async with open_world(spans=SPANS * NUM_REPLICAS) as world, world.model.session(max_length=64) as session:
        async with dying_servers(world, session) as killed:
            tokens = [token async for token in session.generate(PROMPT, max_new_tokens=50, **GREEDY)]
        assert tokens == local_tokens(local, PROMPT, 50)
        assert session.num_recoveries >= len(killed) - 1 >= 4


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: "-".join(options),
)
async def test_every_way_to_generate_survives_dying_servers(open_world, local, options: dict[str, Any]) -> None:
    prompt = torch.tensor([PROMPT])
    async with open_world(spans=SPANS * NUM_REPLICAS) as world, world.model.session(max_length=64) as session:
        async with dying_servers(world, session) as killed:
            torch.manual_seed(3)
            got = await session.complete(prompt, max_new_tokens=40, **options)
        torch.manual_seed(3)
        expected = local.generate(prompt, max_new_tokens=40, **options)
        assert got.tolist() == expected.tolist()
        assert len(killed) >= 2


async def test_batch_with_padding_survives_dying_servers(open_world, local) -> None:
    prompts = torch.tensor([[0, 0, 0, 7, 9], [0, 0, 4, 8, 15], PROMPT])
    mask = (prompts != 0).long()
    async with open_world(spans=SPANS * NUM_REPLICAS) as world, world.model.session(max_length=64) as session:
        async with dying_servers(world, session) as killed:
            got = await session.complete(prompts, attention_mask=mask, max_new_tokens=40, **GREEDY)
        assert got.tolist() == local.generate(prompts, attention_mask=mask, max_new_tokens=40, **GREEDY).tolist()
        assert len(killed) >= 2


async def test_turns_of_a_chat_and_going_back_survive_dying_servers(open_world, local) -> None:
    async with open_world(spans=SPANS * NUM_REPLICAS) as world, world.model.session(max_length=100) as session:
        text: list[int] = []
        async with dying_servers(world, session) as killed:
            for said in (PROMPT, [7, 8, 9], [30], [4, 4]):
                text += said
                answer = [token async for token in session.generate(said, max_new_tokens=12, **GREEDY)]
                assert answer == local_tokens(local, text, 12)
                text += answer
                session.position = len(text) - 4
                text = text[:-4]
        assert len(killed) >= 3


async def test_a_text_that_was_cut_short_is_no_end_and_goes_on_when_the_blocks_are_back(open_world, local) -> None:
    config = ClientConfig(known_peers_path=None, recovery_timeout_s=0.5)
    async with open_world(spans=(*SPANS, SPANS[1]), config=config) as world:
        first, spare = (peer_id for peer_id, info in world.view.servers.items() if info.span == SPANS[1])
        spare_info = world.view.servers.pop(spare)
        async with world.model.session(max_length=64) as session:
            stream = session.generate(PROMPT, max_new_tokens=40, **GREEDY)
            tokens = [await anext(stream) for _ in range(10)]
            world.memory.kill(first)
            with pytest.raises(MissingBlocksError, match="no server for blocks 3:4"):
                tokens += [token async for token in stream]
            assert 10 <= len(tokens) < 40
            assert tokens == local_tokens(local, PROMPT, len(tokens))
            world.view.servers[spare] = spare_info
            again = [token async for token in session.generate(PROMPT, max_new_tokens=40, **GREEDY)]
            assert again == local_tokens(local, PROMPT, 40)
