"""A session computes with the tuning that it was opened with, whatever becomes of servers and parameters."""

from typing import Any

import pytest
import torch
import trio
from tiny_swarm import TinySwarm
from tiny_training import TUNED_PATHS, LocalBlocks, random_states, random_tuning

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import ConfigError, RequestRefused
from p2pswarm.core.span import Span

FIRST, MIDDLE, LAST = Span(0, 3), Span(3, 4), Span(4, 8)
TWICE = (FIRST, MIDDLE, LAST, FIRST, MIDDLE, LAST)
STATES = random_states(2, 9, seed=1)
STEPS = ((0, 2), (2, 3), (3, 7), (7, 8), (8, 9))
"""The tuning's four prompts are for tokens of several of them."""


@pytest.fixture(scope="module")
def tuning(tiny_llama: Checkpoint, local: Any) -> Tuning:
    torch.set_num_threads(1)
    return random_tuning(local, tiny_llama, paths=TUNED_PATHS["llama"])


@pytest.fixture(scope="module")
def expected(tiny_llama: Checkpoint, local: Any, tuning: Tuning) -> torch.Tensor:
    with torch.no_grad():
        return LocalBlocks(tiny_llama, local)(STATES, tuning)


def step(start: int, end: int) -> StepInput:
    return StepInput(STATES[:, start:end], start)


async def test_steps_and_passes_are_tuned_as_the_local_model_is(
    open_world, tuning: Tuning, expected: torch.Tensor
) -> None:
    async with open_world() as world:
        async with world.model.session(max_length=20, tuning=tuning) as session:
            answers = [await session.step(step(*part)) for part in STEPS]
        torch.testing.assert_close(torch.cat(answers, 1), expected, rtol=1e-4, atol=1e-5)
        passed = await world.model.forward(STATES, tuning=tuning)
        torch.testing.assert_close(passed, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(await world.model.forward(STATES), expected, rtol=1e-2)


@pytest.mark.parametrize("lost_before", range(1, 5))
@pytest.mark.parametrize("lost_hops", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
async def test_stand_ins_are_tuned_as_those_they_replace(
    open_world, tuning: Tuning, expected: torch.Tensor, lost_before: int, lost_hops: tuple[int, ...]
) -> None:
    async with open_world(spans=TWICE) as world, world.model.session(max_length=20, tuning=tuning) as session:
        for number, (start, end) in enumerate(STEPS):
            if number == lost_before:
                for index in lost_hops:
                    world.memory.kill(session.route.hops[index].peer_id)
            answer = await session.step(step(start, end))
            torch.testing.assert_close(answer, expected[:, start:end], rtol=1e-4, atol=1e-5)
        assert session.num_recoveries == 1


async def test_a_step_of_an_optimizer_changes_no_open_session(
    open_world, tuning: Tuning, expected: torch.Tensor
) -> None:
    parameters = [tensor.clone().requires_grad_() for tensor in tuning.tensors]
    trained = tuning.with_tensors(parameters)
    async with open_world(spans=TWICE) as world, world.model.session(max_length=20, tuning=trained) as session:
        await session.step(step(0, 3))
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        world.memory.kill(session.route.hops[1].peer_id)
        answer = await session.step(step(3, 9))
        torch.testing.assert_close(answer, expected[:, 3:], rtol=1e-4, atol=1e-5)


async def test_sessions_with_different_tunings_and_without_one_do_not_mix(
    open_world, tiny_llama: Checkpoint, local: Any, tuning: Tuning
) -> None:
    other = random_tuning(local, tiny_llama, paths=["mlp.up_proj"], prompts=False, seed=7)
    reference = LocalBlocks(tiny_llama, local)

    async def talk(world: TinySwarm, own: Tuning | None) -> None:
        async with world.model.session(max_length=20, tuning=own) as session:
            answers = [await session.step(step(*part)) for part in STEPS]
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(answers, 1), reference(STATES, own), rtol=1e-4, atol=1e-5)

    async with open_world() as world, trio.open_nursery() as nursery:
        for own in (tuning, None, other, tuning):
            nursery.start_soon(talk, world, own)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Tuning(torch.zeros(7, 2, 64)), r"prompts for this model are \[8, prompt tokens, 64\], got \[7, 2, 64\]"),
        (
            Tuning(None, {(8, "mlp.up_proj"): LowRank(torch.zeros(1, 64), torch.zeros(128, 1))}),
            "has block 8 mlp.up_proj",
        ),
    ],
    ids=["prompts", "block"],
)
async def test_a_tuning_of_another_model_is_refused_here(open_world, wrong: Tuning, message: str) -> None:
    async with open_world() as world:
        with pytest.raises(ConfigError, match=message):
            async with world.model.session(max_length=20, tuning=wrong):
                pass
        with pytest.raises(ConfigError, match=message):
            await world.model.forward(STATES, tuning=wrong)


async def test_a_layer_that_the_blocks_do_not_have_is_refused_by_servers_and_bans_nobody(open_world) -> None:
    wrong = Tuning(None, {(5, "mlp.no_proj"): LowRank(torch.zeros(1, 64), torch.zeros(128, 1))})
    config = ClientConfig(known_peers_path=None, recovery_timeout_s=5.0)
    async with open_world(config=config) as world:
        with pytest.raises(RequestRefused, match=r"blocks 4:8 at .*mlp.no_proj"):
            await world.model.forward(STATES, tuning=wrong)
        async with world.model.session(max_length=20, tuning=wrong) as session:
            with pytest.raises(RequestRefused, match=r"blocks 4:8 at .*mlp.no_proj"):
                await session.step(step(0, 2))
        assert not world.model.servers.banned
