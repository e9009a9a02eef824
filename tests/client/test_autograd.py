"""Blocks in the swarm in torch's graph: from any thread, freed as torch frees, and never a silently wrong gradient."""

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import outcome
import pytest
import torch
import trio
from tiny_swarm import TinySwarm
from tiny_training import TUNED_PATHS, LocalBlocks, random_states, random_tuning

from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.autograd import BlocksPass
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.portal import Portal
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import ConfigError, PeerUnreachable, SessionClosed
from p2pswarm.core.span import Span

ROWS, TOKENS = 4, 5
STATES, WEIGHTS = random_states(ROWS, TOKENS, seed=1), random_states(ROWS, TOKENS, seed=2)
CONFIG = ClientConfig(known_peers_path=None, max_training_tokens=2 * TOKENS)


@pytest.fixture(scope="module")
def expected(tiny_llama: Checkpoint, local: Any) -> torch.Tensor:
    torch.set_num_threads(1)
    return LocalBlocks(tiny_llama, local).gradients(STATES, WEIGHTS).inputs


@pytest.fixture(scope="module")
def tuning(tiny_llama: Checkpoint, local: Any) -> Tuning:
    return random_tuning(local, tiny_llama, paths=TUNED_PATHS["llama"])


def through(world: TinySwarm, states: torch.Tensor, tuning: Tuning | None = None) -> torch.Tensor:
    return world.model.dispatch.run(BlocksPass(StepInput(states, 0), tuning))


def loss_of(world: TinySwarm, inputs: torch.Tensor) -> torch.Tensor:
    return (through(world, inputs) * WEIGHTS).sum()


def trained(world: TinySwarm) -> torch.Tensor:
    """The gradient, found in this thread."""
    inputs = STATES.clone().requires_grad_()
    loss_of(world, inputs).backward()
    assert inputs.grad is not None
    return inputs.grad


def in_another_thread(function: Callable[[], Any]) -> Any:
    """What it returns or raises in a thread that neither trio nor torch has made."""
    results: list[outcome.Outcome[Any]] = []
    thread = threading.Thread(target=lambda: results.append(outcome.capture(function)))
    thread.start()
    thread.join()
    return results[0].unwrap()


async def test_threads_of_trio_and_others_go_back_through_the_swarm(open_world, expected: torch.Tensor) -> None:
    async with open_world(config=CONFIG) as world:
        got = await trio.to_thread.run_sync(trained, world)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        foreign = await trio.to_thread.run_sync(in_another_thread, functools.partial(trained, world))
        assert torch.equal(foreign, got)


async def test_backward_in_another_thread_than_forward(open_world, expected: torch.Tensor) -> None:
    async with open_world(config=CONFIG) as world:
        inputs = STATES.clone().requires_grad_()
        loss = await trio.to_thread.run_sync(loss_of, world, inputs)
        await trio.to_thread.run_sync(in_another_thread, loss.backward)
        torch.testing.assert_close(inputs.grad, expected, rtol=1e-4, atol=1e-4)


def test_plain_blocking_code_trains_behind_a_portal(open_world, expected: torch.Tensor) -> None:
    with Portal() as portal:
        world = portal.enter(open_world(config=CONFIG, call=portal.call)).value
        torch.testing.assert_close(trained(world), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(in_another_thread(lambda: trained(world)), expected, rtol=1e-4, atol=1e-4)
        inputs = STATES.clone().requires_grad_()
        loss = loss_of(world, inputs)
    with pytest.raises(SessionClosed, match="the connection to the swarm is closed"):
        loss.backward()


async def test_in_the_loop_itself_it_says_so_instead_of_waiting_for_ever(open_world) -> None:
    async with open_world(config=CONFIG) as world:
        inputs = STATES.clone().requires_grad_()
        with pytest.raises(ConfigError, match=r"called in the trio loop.*trio\.to_thread\.run_sync"):
            loss_of(world, inputs)
        loss = await trio.to_thread.run_sync(loss_of, world, inputs)
        with pytest.raises(ConfigError, match="called in the trio loop"):
            loss.backward()


async def test_cancelled_backward_ends_with_its_calls(open_world) -> None:
    async with open_world(config=CONFIG) as world:
        inputs = STATES.clone().requires_grad_()
        loss = await trio.to_thread.run_sync(loss_of, world, inputs)
        world.memory.hang(world.peer_of(Span(3, 4)))
        with trio.fail_after(5), trio.move_on_after(0.1) as scope:
            await trio.to_thread.run_sync(loss.backward)
        assert scope.cancelled_caught
        assert inputs.grad is None


async def test_errors_come_out_of_backward_as_they_are(open_world) -> None:
    config = ClientConfig(known_peers_path=None, max_retries=0)
    async with open_world(config=config) as world:
        inputs = STATES.clone().requires_grad_()
        loss = await trio.to_thread.run_sync(loss_of, world, inputs)
        world.memory.kill(world.peer_of(Span(3, 4)))
        with pytest.raises(PeerUnreachable, match="blocks 3:4 at"):
            await trio.to_thread.run_sync(loss.backward)


async def test_what_needs_no_gradient_leaves_no_graph(open_world) -> None:
    async with open_world(config=CONFIG) as world:
        inputs = STATES.clone().requires_grad_()

        def without_grad() -> torch.Tensor:
            with torch.no_grad():
                return through(world, inputs)

        for run in (without_grad, lambda: through(world, STATES)):
            assert not (await trio.to_thread.run_sync(run)).requires_grad
        assert (await trio.to_thread.run_sync(through, world, inputs)).requires_grad


async def test_what_the_way_back_needs_is_freed_by_backward_though_the_loss_is_kept(open_world, monkeypatch) -> None:
    trails: list[weakref.ref[torch.Tensor]] = []
    async with open_world(config=CONFIG) as world:
        training = world.model.dispatch.forward_pass.training
        forward = training.forward

        async def noted(*arguments: Any) -> Any:
            output, trail = await forward(*arguments)
            trails.extend(weakref.ref(tensor) for tensor in trail.tensors)
            return output, trail

        monkeypatch.setattr(training, "forward", noted)
        inputs = STATES.clone().requires_grad_()
        loss = await trio.to_thread.run_sync(loss_of, world, inputs)
        gc.collect()
        assert len(trails) == 2 * 3
        assert all(trail() is not None for trail in trails)
        await trio.to_thread.run_sync(loss.backward)
        gc.collect()
        assert not [trail for trail in trails if trail() is not None]
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            await trio.to_thread.run_sync(loss.backward)


async def test_a_graph_that_is_kept_can_be_gone_back_through_again(open_world, expected: torch.Tensor) -> None:
    async with open_world(config=CONFIG) as world:
        inputs = STATES.clone().requires_grad_()
        loss = await trio.to_thread.run_sync(loss_of, world, inputs)
        for _ in range(2):
            await trio.to_thread.run_sync(functools.partial(loss.backward, retain_graph=True))
        torch.testing.assert_close(inputs.grad, 2 * expected, rtol=1e-4, atol=1e-4)


async def test_values_that_were_changed_in_place_are_an_error(open_world, tuning: Tuning) -> None:
    async with open_world(config=CONFIG) as world:
        leaves = [tensor.clone().requires_grad_() for tensor in tuning.tensors]
        output = await trio.to_thread.run_sync(through, world, STATES, tuning.with_tensors(leaves))
        with torch.no_grad():
            leaves[-1].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            await trio.to_thread.run_sync(output.sum().backward)


async def test_only_what_is_wanted_gets_a_gradient(open_world, tuning: Tuning) -> None:
    async with open_world(config=CONFIG) as world:
        leaves = [tensor.clone() for tensor in tuning.tensors]
        leaves[0].requires_grad_()
        output = await trio.to_thread.run_sync(through, world, STATES, tuning.with_tensors(leaves))
        await trio.to_thread.run_sync(output.sum().backward)
        assert leaves[0].grad is not None
        assert all(leaf.grad is None for leaf in leaves[1:])


async def test_gradients_of_gradients_are_refused(open_world) -> None:
    async with open_world(config=CONFIG) as world:
        inputs = STATES.clone().requires_grad_()

        def twice() -> None:
            loss = through(world, inputs).square().sum()
            (first,) = torch.autograd.grad(loss, inputs, create_graph=True)
            first.sum().backward()

        with pytest.raises(RuntimeError, match="once_differentiable"):
            await trio.to_thread.run_sync(twice)


async def test_the_models_own_class_trains_what_is_put_around_its_blocks(open_world, local: Any) -> None:
    async with open_world(config=CONFIG) as world:
        tokens = torch.tensor([[5, 17, 99, 3, 42], [0, 0, 7, 8, 9]])
        arguments = {"attention_mask": (tokens != 0).long(), "labels": tokens, "use_cache": False}

        def gradient(model: Any) -> torch.Tensor:
            embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
            loss = model(inputs_embeds=embeddings, **arguments).loss
            return torch.autograd.grad(loss, embeddings)[0]

        got = await trio.to_thread.run_sync(gradient, world.model.shell)
        wanted = gradient(local)
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()
