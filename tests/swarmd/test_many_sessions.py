"""Hundreds of sessions of random lengths over a memory for a few of them: never beyond it, none stuck, all exact."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import trio
from timed_device import TimedDevice
from trio.testing import MockClock

from p2pswarm.blocks.kv_pool import KVPool
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.core.errors import ServerBusy, SessionLost
from p2pswarm.core.ids import PeerId, SessionId
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import OpenSession, Step
from swarmd.handler import Served, SpanService
from swarmd.scheduling.work import Kind
from swarmd.span_session import SpanSession

NUM_PAGES = 24
HIDDEN_SIZE = 64
MAX_LENGTH = 160
ARRIVAL_S = 0.02
"""Between two sessions, on average: more than the server can serve at once."""
STEP_S = 0.004


@dataclass
class World:
    service: SpanService
    pool: KVPool
    model: SpanModel
    checkpoint: Checkpoint
    random: random.Random
    num_finished: int = 0
    num_abandoned: int = 0
    num_lost: int = 0
    num_busy: int = 0
    most_pages: int = 0
    finished_at_s: list[float] = field(default_factory=list)

    def request(self, number: int, num_rows: int, max_length: int, first_tokens: int) -> OpenSession:
        return OpenSession(
            SessionId(f"session-{number}"),
            self.checkpoint.model_id,
            self.model.span,
            max_length,
            num_rows,
            alloc_timeout_s=self.random.choice([0.0, 5.0, 60.0]),
            first_tokens=first_tokens,
        )


@asynccontextmanager
async def open_world(checkpoint: Checkpoint, model: SpanModel, seed: int) -> AsyncIterator[World]:
    pool = model.new_pool(NUM_PAGES)
    async with trio.open_nursery() as nursery:
        device = TimedDevice(nursery, STEP_S)
        service = SpanService(
            Served(checkpoint.model_id, model, pool, MAX_LENGTH), device, lambda: pytest.fail("nobody asks")
        )
        world = World(service, pool, model, checkpoint, random.Random(seed))
        watch_pages(world)
        yield world
        nursery.cancel_scope.cancel()


def watch_pages(world: World) -> None:
    """Checks the budget whenever a page is taken."""
    take = world.pool.pages.take

    def take_and_check(*arguments: Any) -> None:
        take(*arguments)
        world.most_pages = max(world.most_pages, world.pool.pages.num_used)
        assert world.pool.used_bytes <= world.pool.size_bytes
        assert world.pool.pages.num_used <= NUM_PAGES

    world.pool.pages.take = take_and_check  # type: ignore[method-assign]


async def generate(world: World, number: int) -> None:
    """One client: a prompt and some tokens; replays when it is sent away; sometimes vanishes."""
    dice = world.random
    num_rows, prompt, length = dice.choice([1, 1, 1, 2]), dice.randint(1, 60), dice.randint(1, 90)
    generator = torch.Generator().manual_seed(number)
    sent = torch.randn(num_rows, prompt + length, HIDDEN_SIZE, generator=generator)
    gives_up_at = dice.randint(0, prompt + length) if dice.random() < 0.2 else None
    answers: list[torch.Tensor] = []
    done = 0
    while done < prompt + length:
        first = max(done, prompt) if done else prompt
        session = await open_session(world, number, num_rows, prompt + length, first)
        try:
            answers = [await step(session, sent, 0, first)]
            done = first
            while done < prompt + length:
                if gives_up_at is not None and done >= gives_up_at:
                    with trio.move_on_after(dice.uniform(0, 2 * STEP_S)):
                        await step(session, sent, done, done + 1)
                    world.num_abandoned += 1
                    return
                await trio.sleep(dice.uniform(0, 0.05))
                answers.append(await step(session, sent, done, done + 1))
                done += 1
        except SessionLost:
            world.num_lost += 1
        finally:
            await session.close()
    expected = world.model.run(sent, None, position=0)
    torch.testing.assert_close(torch.cat(answers, dim=1), expected, rtol=1e-3, atol=1e-4)
    world.num_finished += 1


async def open_session(world: World, number: int, num_rows: int, max_length: int, first: int) -> SpanSession:
    peer_id = PeerId(f"peer-{number % 20}")
    while True:
        try:
            return await world.service.open_session(peer_id, world.request(number, num_rows, max_length, first))
        except ServerBusy:
            world.num_busy += 1
            await trio.sleep(world.random.uniform(0.2, 1.0))


async def step(session: SpanSession, sent: torch.Tensor, start: int, end: int) -> torch.Tensor:
    reply = await session.step(Step(0, start, encode_tensor(sent[:, start:end].contiguous())))
    assert reply.position == end
    return decode_tensor(reply.hidden_states)


@pytest.mark.parametrize(
    ("num_sessions", "seed"),
    [
        (40, 1),
        pytest.param(500, 2, marks=pytest.mark.slow),
        pytest.param(500, 3, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    ],
)
async def test_every_session_finishes_exact_within_the_budget(
    num_sessions: int, seed: int, autojump_clock: MockClock, tiny_checkpoint: Checkpoint, tiny_span: SpanModel
) -> None:
    async with open_world(tiny_checkpoint, tiny_span, seed) as world:
        with trio.fail_after(600):
            async with trio.open_nursery() as clients:
                for number in range(num_sessions):
                    clients.start_soon(generate, world, number)
                    await trio.sleep(world.random.expovariate(1 / ARRIVAL_S))
        await trio.sleep(1)
        statistics = world.service.dispatcher.statistics()
        memory = world.service.memory
    assert world.num_finished + world.num_abandoned == num_sessions
    assert world.num_abandoned > num_sessions / 20
    assert world.most_pages >= 0.8 * NUM_PAGES
    assert world.num_lost > 0
    assert world.num_busy > 0
    assert memory.tokens_left == memory.total_tokens
    assert (memory.num_tenants, memory.num_queued, statistics.num_waiting) == (0, 0, 0)
    assert statistics.num_parts[Kind.DECODE] < 0.8 * statistics.num_tokens[Kind.DECODE]
