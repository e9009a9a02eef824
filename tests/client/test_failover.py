"""Whatever a session holds survives the loss of its servers: prompts, rows, padding, beams, positions gone back to."""

from dataclasses import replace

import pytest
import torch
import trio
import trio.lowlevel

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import RequestRefused
from p2pswarm.core.span import Span

FIRST, MIDDLE, LAST = Span(0, 3), Span(3, 4), Span(4, 8)
TWICE = (FIRST, MIDDLE, LAST, FIRST, MIDDLE, LAST)
HIDDEN_SIZE = 64


def states(num_tokens: int, batch_size: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


async def steps_without_failures(open_world, steps: list[StepInput]) -> list[torch.Tensor]:
    async with open_world() as world, world.model.session(max_length=60) as session:
        return [await session.step(step) for step in steps]


def a_life(batch_size: int = 3) -> list[StepInput]:
    """Padding, positions of its own, decoding, beams, going back, another prompt."""
    padding = torch.ones(batch_size, 9, dtype=torch.bool)
    padding[1, :4] = False
    beams = torch.tensor([2, 0, 0])
    return [
        StepInput(states(9, batch_size, 1), 0, padding, (padding.cumsum(1) - 1).clamp(min=0)),
        StepInput(states(1, batch_size, 2), 9, position_ids=torch.tensor([[9], [5], [9]])),
        StepInput(states(1, batch_size, 3), 10, position_ids=torch.tensor([[10], [6], [10]]), beam_indices=beams),
        StepInput(states(1, batch_size, 4), 11, position_ids=torch.tensor([[11], [11], [11]])),
        StepInput(states(4, batch_size, 5), 7),
        StepInput(states(1, batch_size, 6), 11),
    ]


@pytest.mark.parametrize("lost_before", range(1, 6))
@pytest.mark.parametrize("lost_hops", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
async def test_every_step_of_a_life_survives_the_loss_of_any_servers(open_world, lost_before, lost_hops) -> None:
    steps = a_life()
    expected = await steps_without_failures(open_world, steps)
    async with open_world(spans=TWICE) as world, world.model.session(max_length=60) as session:
        for number, step in enumerate(steps):
            if number == lost_before:
                for index in lost_hops:
                    world.memory.kill(session.route.hops[index].peer_id)
            answer = await session.step(step)
            torch.testing.assert_close(answer, expected[number], rtol=1e-4, atol=1e-5)
        assert session.num_recoveries == 1


@pytest.mark.parametrize("lost_hop", [1, 2])
async def test_inputs_that_were_let_go_of_come_out_of_the_blocks_before(open_world, lost_hop) -> None:
    steps = a_life()
    expected = await steps_without_failures(open_world, steps)
    config = ClientConfig(known_peers_path=None, max_history_bytes=1)
    async with open_world(spans=TWICE, config=config) as world, world.model.session(max_length=60) as session:
        for number, step in enumerate(steps):
            if number == 3:
                world.memory.kill(session.route.hops[lost_hop].peer_id)
            answer = await session.step(step)
            torch.testing.assert_close(answer, expected[number], rtol=1e-4, atol=1e-5)


async def test_stand_ins_may_cut_the_blocks_in_other_places(open_world) -> None:
    steps = a_life()
    expected = await steps_without_failures(open_world, steps)
    spares = (Span(0, 2), Span(2, 5), Span(5, 8))
    async with open_world(spans=(FIRST, Span(3, 8), *spares)) as world:
        for spare in spares:
            peer_id = world.peer_of(spare)
            world.view.servers[peer_id] = replace(world.view.servers[peer_id], inference_tokens_per_s=1.0)
        async with world.model.session(max_length=60) as session:
            for number, step in enumerate(steps):
                if number in (1, 4):
                    world.memory.kill(session.route.hops[-1 if number == 1 else 0].peer_id)
                answer = await session.step(step)
                torch.testing.assert_close(answer, expected[number], rtol=1e-4, atol=1e-5)
            assert [str(hop.span) for hop in session.route.hops] == ["0:2", "2:5", "5:8"]


async def test_step_with_beams_that_was_cut_short_can_be_made_again(open_world) -> None:
    steps = a_life()
    expected = await steps_without_failures(open_world, steps)
    async with open_world() as world, world.model.session(max_length=60) as session:
        for number, step in enumerate(steps):
            if number == 2:
                last = session.route.hops[-1].peer_id
                world.memory.hang(last)
                with trio.move_on_after(0.1) as scope:
                    await session.step(step)
                assert scope.cancelled_caught
                world.memory.resume(last)
            answer = await session.step(step)
            torch.testing.assert_close(answer, expected[number], rtol=1e-4, atol=1e-5)


async def test_step_with_beams_in_parts_that_was_cut_short_can_be_made_again(open_world) -> None:
    beams = torch.tensor([2, 0, 0])
    steps = [StepInput(states(5, 3, 1), 0), StepInput(states(6, 3, 2), 5, beam_indices=beams)]
    expected = await steps_without_failures(open_world, steps)
    config = ClientConfig(known_peers_path=None, max_step_bytes=3 * 2 * HIDDEN_SIZE * 4)
    async with open_world(config=config) as world, world.model.session(max_length=60) as session:
        await session.step(steps[0])
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cut_short() -> None:
                    while session.position < 7:
                        await trio.lowlevel.checkpoint()
                    world.memory.hang(session.route.hops[-1].peer_id)
                    await trio.sleep(0.1)
                    scope.cancel()

                nursery.start_soon(cut_short)
                await session.step(steps[1])
        assert scope.cancelled_caught
        assert session.position == 5
        world.memory.resume(session.route.hops[-1].peer_id)
        torch.testing.assert_close(await session.step(steps[1]), expected[1], rtol=1e-4, atol=1e-5)


async def test_own_mistake_bans_nobody_and_leaves_the_session_as_it_was(open_world) -> None:
    async with open_world() as world, world.model.session(max_length=60) as session:
        x = states(4)
        await session.step(StepInput(x[:, :3], 0))
        with pytest.raises(RequestRefused, match=r"blocks 0:3 at .* NaN"):
            await session.step(StepInput(x[:, 3:] * float("nan"), 3))
        assert not world.model.servers.banned
        assert session.position == 3
        await session.step(StepInput(x[:, 3:], 3))
        assert session.num_recoveries == 0


async def test_all_servers_forget_the_session_after_failures_too(open_world) -> None:
    async with open_world(spans=TWICE) as world:
        async with world.model.session(max_length=60) as session:
            await session.step(StepInput(states(3), 0))
            world.memory.kill(session.route.hops[1].peer_id)
            await session.step(StepInput(states(1), 3))
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert world.all_room_is_free()
