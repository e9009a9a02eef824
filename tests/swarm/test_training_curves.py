"""Fifty steps of an optimizer over a swarm give the losses that they give on one machine, though servers die."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_swarm import SPANS, TinySwarm
from tiny_training import TUNED_PATHS, LocalBlocks, random_tuning
from torch.nn import functional as F

from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.portal import Portal
from p2pswarm.client.tuning import Tuning
from p2pswarm.models.remote_sequential import RemoteSequential

NUM_STEPS = 50
BATCH_SIZE, NUM_TOKENS = 4, 8
LEARNING_RATE = 0.01
COPIES = 3
"""Of each span."""
STEPS_PER_DEATH = 10

Blocks = Callable[[torch.Tensor, Tuning], torch.Tensor]


@pytest.fixture(scope="module")
def tuning(tiny_llama: Checkpoint, local: Any) -> Tuning:
    torch.set_num_threads(1)
    return random_tuning(local, tiny_llama, paths=TUNED_PATHS["llama"])


def losses(local: Any, blocks: Blocks, tuning: Tuning, before_backward: Callable[[int], None]) -> Iterator[float]:
    """Of predicting random texts, the same ones over and over; only the tuning is trained."""
    parameters = [tensor.clone().requires_grad_() for tensor in tuning.tensors]
    trained = tuning.with_tensors(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    texts = torch.randint(3, 128, (3, BATCH_SIZE, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    for number in range(NUM_STEPS):
        tokens = texts[number % len(texts)]
        states = blocks(local.get_input_embeddings()(tokens).detach(), trained)
        logits = local.lm_head(local.model.norm(states))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        before_backward(number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.fixture(scope="module")
def local_losses(tiny_llama: Checkpoint, local: Any, tuning: Tuning) -> list[float]:
    return list(losses(local, LocalBlocks(tiny_llama, local), tuning, lambda number: None))


def swarm_losses(world: TinySwarm, local: Any, tuning: Tuning, before_backward: Callable[[int], None]) -> list[float]:
    remote = RemoteSequential(world.model)
    return list(losses(local, lambda states, own: remote(states, tuning=own), tuning, before_backward))


def largest_difference(some: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(some, others, strict=True))


CONFIG = ClientConfig(known_peers_path=None, max_training_tokens=2 * NUM_TOKENS)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_losses_are_those_of_one_machine(open_world, local: Any, tuning: Tuning, local_losses: list[float]) -> None:
    with Portal() as portal:
        world = portal.enter(open_world(config=CONFIG, call=portal.call)).value
        got = swarm_losses(world, local, tuning, lambda number: None)
    assert largest_difference(got, local_losses) < 1e-3
    assert got[-1] < 0.5 * got[0]


@pytest.mark.slow
def test_a_server_lost_every_ten_steps_changes_nothing_but_time(
    open_world, local: Any, tuning: Tuning, local_losses: list[float]
) -> None:
    with Portal() as portal:
        world = portal.enter(open_world(spans=SPANS * COPIES, config=CONFIG, call=portal.call)).value
        doomed = list(world.view.servers)[: len(SPANS) * (COPIES - 1)]
        killed = []

        async def kill_one() -> None:
            killed.append(doomed.pop(0))
            world.memory.kill(killed[-1])

        def kill(number: int) -> None:
            if number % STEPS_PER_DEATH == STEPS_PER_DEATH - 1:
                portal.call(kill_one)

        got = swarm_losses(world, local, tuning, kill)
    assert len(killed) == NUM_STEPS // STEPS_PER_DEATH
    assert largest_difference(got, local_losses) < 1e-3
