"""Gradients through a swarm are the local ones, whoever dies, hangs or lies on the way; nothing waits for ever."""

import functools
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
import trio
import trio.lowlevel
import trio.testing
from tiny_training import NUM_BLOCKS, TUNED_PATHS, Gradients, LocalBlocks, random_states, random_tuning
from training_world import BACKWARD_S, FORWARD_S, TrainingWorld, open_training_world

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.training import Trail
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import ConfigError, MissingBlocksError, RequestRefused
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import BanReason
from p2pswarm.testing.faulty_service import Fault
from p2pswarm.wire.messages import Backward, Codec, Forward

FIRST, MIDDLE, LAST = Span(0, 3), Span(3, 4), Span(4, 8)
TWICE = (FIRST, MIDDLE, LAST, FIRST, MIDDLE, LAST)
ROWS, TOKENS = 6, 5
OpenWorld = Callable[..., AbstractAsyncContextManager[TrainingWorld]]


def config(**options: Any) -> ClientConfig:
    """Sub-batches of two rows, three of them."""
    return ClientConfig(known_peers_path=None, **{"max_training_tokens": 2 * TOKENS, **options})


@pytest.fixture(scope="module")
def open_world(tiny_llama: Checkpoint) -> OpenWorld:
    torch.set_num_threads(1)
    load_part = functools.cache(functools.partial(load_span, tiny_llama))
    return functools.partial(open_training_world, tiny_llama, load_part, config=config())


@pytest.fixture(scope="module")
def tuning(tiny_llama: Checkpoint, local: Any) -> Tuning:
    return random_tuning(local, tiny_llama, paths=TUNED_PATHS["llama"])


STATES, WEIGHTS = random_states(ROWS, TOKENS, seed=1), random_states(ROWS, TOKENS, seed=2)


@pytest.fixture(scope="module")
def expected(tiny_llama: Checkpoint, local: Any, tuning: Tuning) -> Gradients:
    return LocalBlocks(tiny_llama, local).gradients(STATES, WEIGHTS, tuning)


def assert_close(got: Gradients, expected: Gradients) -> None:
    pairs = [(got.output, expected.output), (got.inputs, expected.inputs)]
    for one, other in [*pairs, *zip(got.tuning, expected.tuning, strict=True)]:
        assert (one - other).norm() <= 1e-4 * other.norm()


def assert_same_bits(got: Gradients, expected: Gradients) -> None:
    assert torch.equal(got.output, expected.output)
    assert torch.equal(got.inputs, expected.inputs)
    assert all(map(torch.equal, got.tuning, expected.tuning))


async def test_gradients_of_sub_batches_over_three_servers_are_the_local_ones(
    open_world: OpenWorld, tuning: Tuning, expected: Gradients, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world() as world:
        assert_close(await world.step(STATES, WEIGHTS, tuning), expected)
        assert len(world.works(Forward)) == len(world.works(Backward)) == 9


async def forward(world: TrainingWorld, tuning: Tuning) -> tuple[torch.Tensor, Trail]:
    return await world.training.forward(StepInput(STATES, 0), tuning)


async def exact(open_world: OpenWorld, tuning: Tuning | None, **options: Any) -> Gradients:
    """What comes of it where nothing goes wrong."""
    async with open_world(**options) as world:
        return await world.step(STATES, WEIGHTS, tuning)


@pytest.mark.parametrize("seed", range(3))
async def test_sums_do_not_depend_on_who_is_faster(
    open_world: OpenWorld, tuning: Tuning, seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    options = {"spans": TWICE, "config": config(max_training_tokens=TOKENS)}
    expected = await exact(open_world, tuning, **options)
    async with open_world(**options) as world:
        chance = random.Random(seed)
        for service in world.services.values():
            service.delay_s = functools.partial(chance.uniform, 0.0, 20.0)
        assert_same_bits(await world.step(STATES, WEIGHTS, tuning), expected)


async def test_a_gradient_without_a_tuning_is_of_the_inputs_alone(
    open_world: OpenWorld, tiny_llama: Checkpoint, local: Any, autojump_clock: trio.testing.MockClock
) -> None:
    assert_close(await exact(open_world, None), LocalBlocks(tiny_llama, local).gradients(STATES, WEIGHTS))


@pytest.mark.parametrize("after_s", [0.5, 3.5, 9.0, 14.0])
@pytest.mark.parametrize("span", [FIRST, MIDDLE, LAST], ids=str)
async def test_a_server_that_dies_at_any_moment_changes_no_bit(
    open_world: OpenWorld, tuning: Tuning, span: Span, after_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    expected = await exact(open_world, tuning)
    async with open_world(spans=TWICE) as world, trio.open_nursery() as nursery:

        async def kill() -> None:
            await trio.sleep(after_s)
            busy = [peer_id for peer_id in world.peers_of(span) if world.services[peer_id].num_inside]
            world.memory.kill((busy or world.peers_of(span))[0])

        nursery.start_soon(kill)
        assert_same_bits(await world.step(STATES, WEIGHTS, tuning), expected)


async def test_only_the_lost_leg_of_a_sub_batch_is_run_again(
    open_world: OpenWorld, tuning: Tuning, autojump_clock: trio.testing.MockClock
) -> None:
    expected = await exact(open_world, tuning)
    async with open_world(spans=(FIRST, MIDDLE, LAST, LAST)) as world:
        output, trail = await forward(world, tuning)
        lost = trail.tracks[0].legs[-1].hop.peer_id
        num_lost = sum(track.legs[-1].hop.peer_id == lost for track in trail.tracks)
        world.memory.kill(lost)
        inputs, found = await world.training.backward(trail, WEIGHTS)
        assert found is not None
        assert_same_bits(Gradients(output, inputs, found.tensors), expected)
        assert len(world.works(Forward)) == 9  # the stand-in has what entered the blocks from here
        assert len(world.works(Backward)) == 9
        assert num_lost > 0


async def test_stand_ins_may_cut_the_lost_blocks_in_other_places(
    open_world: OpenWorld, tuning: Tuning, autojump_clock: trio.testing.MockClock
) -> None:
    expected = await exact(open_world, tuning)
    spares = (Span(2, 5), Span(5, 6), Span(6, 8))
    async with open_world(spans=(FIRST, Span(3, 8), *spares)) as world:
        left = {span: world.view.servers.pop(world.peers_of(span)[0]) for span in spares}
        output, trail = await forward(world, tuning)
        world.memory.kill(world.peers_of(Span(3, 8))[0])
        world.view.servers |= {info.peer_id: info for info in left.values()}
        inputs, found = await world.training.backward(trail, WEIGHTS)
        assert found is not None
        assert_same_bits(Gradients(output, inputs, found.tensors), expected)
        again = [work.span for work in world.works(Forward) if work.span.start >= 3 and work.span.end <= 6]
        assert sorted(again) == [Span(3, 5)] * 3 + [Span(5, 6)] * 3  # all but the last of the stand-ins


@pytest.mark.parametrize("kind", [Forward, Backward], ids=["forward", "backward"])
@pytest.mark.parametrize("fault", [Fault.HANGS, Fault.FAILS, Fault.IS_BUSY, Fault.REFUSES, Fault.NOT_FINITE])
async def test_a_server_with_any_fault_is_gone_round(
    open_world: OpenWorld, tuning: Tuning, fault: Fault, kind: type, autojump_clock: trio.testing.MockClock
) -> None:
    expected = await exact(open_world, tuning)
    async with open_world(spans=(FIRST, MIDDLE, LAST, LAST), config=config(ban_s=1000.0)) as world:
        broken = world.peers_of(LAST)[0]
        world.view.servers[broken] = replace(world.view.servers[broken], throughput_tokens_per_s=1e9)  # drawn first
        if kind is Forward:
            world.faults[broken].fault = fault
        output, trail = await forward(world, tuning)
        world.faults[broken].fault = fault
        inputs, found = await world.training.backward(trail, WEIGHTS)
        assert found is not None
        assert_same_bits(Gradients(output, inputs, found.tensors), expected)
        assert world.faults[broken].num_faults_shown > 0
        is_liar = fault in (Fault.FAILS, Fault.NOT_FINITE)
        banned = world.model.servers.banned
        assert (broken in banned) is (is_liar or fault is Fault.HANGS)
        assert not is_liar or banned[broken].reason is BanReason.MISBEHAVED


@pytest.mark.parametrize("kind", [Forward, Backward], ids=["forward", "backward"])
async def test_a_server_that_answers_nothing_any_more_costs_seconds(
    open_world: OpenWorld, tuning: Tuning, kind: type, autojump_clock: trio.testing.MockClock
) -> None:
    expected = await exact(open_world, tuning)
    async with open_world(spans=(FIRST, MIDDLE, LAST, LAST)) as world:
        output, trail = await forward(world, tuning)
        hung = trail.tracks[0].legs[-1].hop.peer_id
        world.memory.hang(hung)
        started_at_s = trio.current_time()
        if kind is Forward:
            output, trail = await forward(world, tuning)
        inputs, found = await world.training.backward(trail, WEIGHTS)
        assert found is not None
        assert_same_bits(Gradients(output, inputs, found.tensors), expected)
        assert trio.current_time() - started_at_s < 60.0


async def test_a_server_that_is_only_slow_is_waited_for(
    open_world: OpenWorld, tuning: Tuning, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world() as world:
        for service in world.services.values():
            service.delay_s = lambda: 15.0
        await world.step(STATES, WEIGHTS, tuning)
        assert not world.model.servers.banned
        assert len(world.works(Forward)) == len(world.works(Backward)) == 9


async def test_all_servers_of_a_chain_work_at_once(
    open_world: OpenWorld, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(config=config(max_training_tokens=TOKENS)) as world:
        started_at_s = trio.current_time()
        await world.training.forward(StepInput(STATES, 0))
        # Six sub-batches follow each other through three servers; one at a time they would take 18 s.
        assert trio.current_time() - started_at_s == pytest.approx((6 + 3 - 1) * FORWARD_S, abs=1.0)


async def test_two_chains_take_half_the_time(open_world: OpenWorld, autojump_clock: trio.testing.MockClock) -> None:
    whole = Span(0, NUM_BLOCKS)
    async with open_world(spans=(whole,) * 8, config=config(max_training_tokens=TOKENS)) as world:
        await world.step(STATES, WEIGHTS)
        at_once = [
            sum(other.started_at_s <= work.started_at_s < other.ended_at_s for other in world.works(Backward))
            for work in world.works(Backward)
        ]
        assert max(at_once) > 1
        assert trio.current_time() < 6 * (FORWARD_S + BACKWARD_S)


@pytest.mark.parametrize("at_once", [1, 2, 4])
async def test_no_more_calls_are_under_way_than_the_config_says(
    open_world: OpenWorld, tuning: Tuning, at_once: int, autojump_clock: trio.testing.MockClock
) -> None:
    settings = config(max_training_tokens=TOKENS, max_training_calls=at_once)
    seen: list[int] = []
    async with open_world(spans=TWICE, config=settings) as world:
        for service in world.services.values():
            service.delay_s = lambda: float(bool(seen.append(sum(s.num_inside for s in world.services.values()))))
        await world.step(STATES, WEIGHTS, tuning)
    assert max(seen) == at_once


@pytest.mark.parametrize("kind", [Forward, Backward], ids=["forward", "backward"])
async def test_blocks_that_nobody_serves_any_more_are_told_after_the_recovery_time(
    open_world: OpenWorld, tuning: Tuning, kind: type, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(spans=(FIRST, MIDDLE, MIDDLE, LAST)) as world:
        _, trail = await forward(world, tuning)
        for peer_id in world.peers_of(MIDDLE):
            world.memory.hang(peer_id)
        started_at_s = trio.current_time()
        with pytest.raises(MissingBlocksError, match=r"no server for blocks 3:4 .*tried: "):
            await (forward(world, tuning) if kind is Forward else world.training.backward(trail, WEIGHTS))
        assert 60.0 <= trio.current_time() - started_at_s < 120.0


async def test_a_server_that_comes_back_in_time_is_used_again(
    open_world: OpenWorld, tuning: Tuning, autojump_clock: trio.testing.MockClock
) -> None:
    expected = await exact(open_world, tuning)
    async with open_world() as world, trio.open_nursery() as nursery:

        async def hang() -> None:
            (peer_id,) = world.peers_of(MIDDLE)
            await trio.sleep(2.5)
            world.memory.hang(peer_id)
            await trio.sleep(40.0)
            world.memory.resume(peer_id)

        nursery.start_soon(hang)
        assert_same_bits(await world.step(STATES, WEIGHTS, tuning), expected)


@pytest.mark.parametrize("after_s", [0.5, 5.5, 9.5, 15.0])
async def test_cancelled_training_leaves_nothing_behind(
    open_world: OpenWorld, tuning: Tuning, after_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world() as world:
        await forward(world, tuning)  # connects
        await trio.sleep(200.0)  # idle streams are closed
        num_tasks = trio.lowlevel.current_statistics().tasks_living
        with trio.move_on_after(after_s) as scope:
            await world.step(STATES, WEIGHTS, tuning)
        assert scope.cancelled_caught
        await trio.sleep(200.0)
        assert trio.lowlevel.current_statistics().tasks_living == num_tasks
        assert not any(service.num_inside for service in world.services.values())


async def test_a_request_that_all_servers_refuse_is_told_at_once_and_bans_nobody(
    open_world: OpenWorld, tuning: Tuning, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(spans=TWICE) as world:
        _, trail = await forward(world, tuning)
        for peer_id in world.peers_of(MIDDLE):
            world.faults[peer_id].fault = Fault.REFUSES
        started_at_s = trio.current_time()
        with pytest.raises(RequestRefused, match=r"blocks 3:4 at .*: this server was made to refuse everything"):
            await world.training.backward(trail, WEIGHTS)
        assert trio.current_time() - started_at_s < 30.0
        assert not world.model.servers.banned


async def test_what_cannot_be_right_is_refused_here(
    open_world: OpenWorld, tuning: Tuning, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world() as world:
        _, trail = await forward(world, tuning)
        _, no_trail = await world.training.forward(StepInput(STATES, 0), keeps_trail=False)
        for gradients, message in (
            (WEIGHTS[:, :-1], r"\[6, 5, 64\], got \[6, 4, 64\]"),
            (WEIGHTS * float("nan"), "holds NaN or infinity"),
        ):
            with pytest.raises(ConfigError, match=message):
                await world.training.backward(trail, gradients)
        with pytest.raises(ConfigError, match="went forward without keeping a trail"):
            await world.training.backward(no_trail, WEIGHTS)
        for batch, bad, blocks, message in (
            (
                StepInput(STATES[:, :, :-1], 0),
                None,
                None,
                r"\[batch, tokens, 64\] of at least a token, got \[6, 5, 63\]",
            ),
            (StepInput(STATES[:, :0], 0), None, None, "at least a token"),
            (StepInput(STATES, 0), Tuning(torch.zeros(7, 2, 64)), None, r"\[8, prompt tokens, 64\], got \[7, 2, 64\]"),
            (StepInput(STATES, 0), None, Span(5, 9), "has the blocks 0:8, asked were 5:9"),
        ):
            with pytest.raises(ConfigError, match=message):
                await world.training.forward(batch, bad, None, blocks)


async def test_gradients_by_servers_in_bfloat16_stay_within_their_bound(
    tiny_llama: Checkpoint, tuning: Tuning, expected: Gradients, autojump_clock: trio.testing.MockClock
) -> None:
    load_part = functools.partial(load_span, tiny_llama, dtype=torch.bfloat16)
    async with open_training_world(tiny_llama, load_part, config=config()) as world:
        for peer_id, info in world.view.servers.items():
            world.view.servers[peer_id] = replace(info, dtype="bfloat16")
        got = await world.step(STATES, WEIGHTS, tuning)
    pairs = [(got.inputs, expected.inputs), *zip(got.tuning, expected.tuning, strict=True)]
    errors = [float((one - other).norm() / other.norm()) for one, other in pairs]
    assert 1e-3 < max(errors) < 0.1


@pytest.mark.parametrize(
    ("codec", "bound"), [(Codec.FLOAT16, 2e-3), (Codec.BFLOAT16, 2e-2), (Codec.BLOCKWISE_INT8, 5e-2)]
)
async def test_gradients_by_narrower_codecs_stay_within_their_bound(
    open_world: OpenWorld,
    tuning: Tuning,
    expected: Gradients,
    codec: Codec,
    bound: float,
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(config=config(codec=codec)) as world:
        got = await world.step(STATES, WEIGHTS, tuning)
    pairs = [(got.inputs, expected.inputs), *zip(got.tuning, expected.tuning, strict=True)]
    assert max(float((one - other).norm() / other.norm()) for one, other in pairs) < bound
