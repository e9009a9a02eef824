"""A server that stops hands its sessions over: whatever they are doing, their clients hear `SessionLost`, which is no
failure, and their room is free when the device is done with it."""

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from random import Random

import pytest
import torch
import trio
from timed_device import TimedDevice
from trio.testing import MockClock

from p2pswarm.blocks.pages import PAGE_TOKENS
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.core.errors import ServerBusy, SessionLost
from p2pswarm.core.ids import ModelId, SessionId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.span import Span
from p2pswarm.net.network import Network
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import OpenSession, PushedStep, Step
from swarmd.device_thread import REST_S
from swarmd.handler import Served, SpanService

SPAN = Span(2, 6)
HIDDEN_SIZE = 64
MAX_LENGTH = 64
BATCH_SIZE = 64
CACHE_TOKENS = 4 * BATCH_SIZE * MAX_LENGTH
TIMEOUT_S = 60.0
GRACE_S = 5.0
LATENCY_S = 0.05


@dataclass
class World:
    memory: MemoryNetwork
    server: Network
    rpc: RpcServer
    service: SpanService
    device: TimedDevice
    model_id: ModelId
    client: RpcClient
    session_numbers: Iterator[int]

    def session(self, batch_size: int = 1) -> AbstractAsyncContextManager[RemoteSession]:
        name = SessionId(f"session-{next(self.session_numbers)}")
        request = OpenSession(name, self.model_id, SPAN, MAX_LENGTH, batch_size)
        return self.client.open_session(self.server.peer_id, request, TIMEOUT_S)

    async def drain(self, after_s: float = 0.0, grace_s: float = GRACE_S) -> float:
        """How long it took; nothing is held any more."""
        await trio.sleep(after_s)
        began_at_s = trio.current_time()
        await self.rpc.drain(grace_s)
        took_s = trio.current_time() - began_at_s
        assert self.rpc.statistics().num_streams == 0
        assert self.rpc.statistics().received_bytes == 0
        await trio.sleep(self.device.work_s + REST_S)  # for what the device was in the middle of
        assert self.service.memory.tokens_left == CACHE_TOKENS
        return took_s


@pytest.fixture
async def world(tiny_checkpoint: Checkpoint, tiny_span: SpanModel) -> AsyncIterator[World]:
    async with open_world(tiny_checkpoint, tiny_span, Link(LATENCY_S)) as opened:
        yield opened


@asynccontextmanager
async def open_world(checkpoint: Checkpoint, part: SpanModel, link: Link) -> AsyncIterator[World]:
    memory = MemoryNetwork(Random(7), link)
    async with (
        memory.node(1) as server,
        memory.node(2, listens=False) as network,
        open_transparent_nursery() as nursery,
    ):
        device = TimedDevice(nursery)
        served = Served(checkpoint.model_id, part, part.new_pool(CACHE_TOKENS // PAGE_TOKENS), MAX_LENGTH)
        service = SpanService(served, device, _no_info)
        rpc = RpcServer(server, service)
        await nursery.start(rpc.run)
        await network.connect(server.addresses[0])
        yield World(memory, server, rpc, service, device, checkpoint.model_id, RpcClient(network), itertools.count())
        nursery.cancel_scope.cancel()


def _no_info() -> None:
    raise AssertionError("nobody asks here")


def step(step_id: int, position: int, num_tokens: int = 1, batch_size: int = 1) -> Step:
    return Step(step_id, position, encode_tensor(torch.ones(batch_size, num_tokens, HIDDEN_SIZE)))


async def generate_until_lost(session: RemoteSession, think_s: float = 0.0) -> int:
    """How many steps were answered before the session was handed over; goes back when it is full."""
    for step_id in itertools.count():
        position = step_id % MAX_LENGTH
        try:
            reply = await session.step(step(step_id, position), TIMEOUT_S)
        except SessionLost:
            return step_id
        assert reply.position == position + 1
        await trio.sleep(think_s)
    raise AssertionError


async def test_a_session_at_rest_is_handed_over_at_once(autojump_clock: MockClock, world: World) -> None:
    async with world.session() as session:
        await session.step(step(0, 0), TIMEOUT_S)
        await trio.sleep(10)
        assert await world.drain() < 1
        with pytest.raises(SessionLost, match="about to stop"):
            await session.step(step(1, 1), TIMEOUT_S)


async def test_a_session_that_never_rests_goes_on_for_the_grace_period(autojump_clock: MockClock, world: World) -> None:
    async with world.session() as session, trio.open_nursery() as nursery:
        answered: list[int] = []

        async def generate() -> None:
            answered.append(await generate_until_lost(session))

        nursery.start_soon(generate)
        assert GRACE_S <= await world.drain(after_s=1.0) < GRACE_S + 1
    steps_per_s = 1 / (world.device.work_s + 2 * LATENCY_S)
    assert answered == [pytest.approx(steps_per_s * (1.0 + GRACE_S), abs=2)]


async def test_a_step_in_work_at_the_end_of_the_grace_period_is_handed_over(
    autojump_clock: MockClock, world: World
) -> None:
    world.device.work_s = 30.0
    async with world.session() as session, trio.open_nursery() as nursery:
        nursery.start_soon(world.drain, 1.0)
        began_at_s = trio.current_time()
        with pytest.raises(SessionLost, match="about to stop"):
            await session.step(step(0, 0), TIMEOUT_S)
        assert trio.current_time() - began_at_s < 1.0 + GRACE_S + 1


async def test_steps_that_wait_for_the_device_are_handed_over(autojump_clock: MockClock, world: World) -> None:
    world.device.work_s = 4.0

    async def lose_a_session() -> None:
        async with world.session() as session:
            assert await generate_until_lost(session) <= 1

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(lose_a_session)
        assert await world.drain(after_s=0.5) < GRACE_S + 1


async def test_a_step_that_waits_for_a_push_is_handed_over(autojump_clock: MockClock, world: World) -> None:
    async with world.session() as session, trio.open_nursery() as nursery:
        await session.send(PushedStep(0, 0, 1))
        nursery.start_soon(world.drain, 1.0)
        with pytest.raises(SessionLost):
            await session.receive(PushedStep(0, 0, 1), TIMEOUT_S)


async def test_a_session_that_is_being_opened_is_sent_elsewhere(autojump_clock: MockClock, world: World) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.drain, LATENCY_S / 2)
        with pytest.raises(ServerBusy, match="about to stop"):
            async with world.session():
                pass


@pytest.mark.parametrize("tenths", range(0, 60, 2))
async def test_a_long_step_and_a_long_answer_on_their_way_end_in_a_handing_over_too(
    tenths: int, autojump_clock: MockClock, tiny_checkpoint: Checkpoint, tiny_span: SpanModel
) -> None:
    """At whatever moment: a step of 1 MiB takes a second each way here."""
    link = Link(LATENCY_S, bandwidth_bytes_per_s=1 << 20)

    async def prefill_until_lost() -> None:
        async with world.session(BATCH_SIZE) as session:
            for step_id in itertools.count():
                try:
                    await session.step(step(step_id, 0, MAX_LENGTH, BATCH_SIZE), TIMEOUT_S)
                except SessionLost:
                    break

    async with open_world(tiny_checkpoint, tiny_span, link) as world, trio.open_nursery() as nursery:
        nursery.start_soon(prefill_until_lost)
        await world.drain(after_s=0.5 + tenths / 10, grace_s=0.5)


@pytest.mark.parametrize("seed", range(20))
async def test_at_no_moment_does_a_session_end_in_an_error(seed: int, autojump_clock: MockClock, world: World) -> None:
    random = Random(seed)

    async def use_and_lose() -> None:
        await trio.sleep(random.uniform(0, 1))
        async with world.session() as session:
            await generate_until_lost(session, think_s=random.choice([0.0, 0.2, 2.0]))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(use_and_lose)
        await world.drain(after_s=random.uniform(1.5, 2.5), grace_s=random.uniform(0, 2))
