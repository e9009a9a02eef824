"""Chains of servers that push to one another: what a token costs, and that its sums are right whatever fails."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.testing.memory_network import Link
from p2pswarm.testing.rpc_world import TIMEOUT_S, ChainWorld, open_chain_world
from p2pswarm.testing.running_sum_service import read_rows, wire_rows
from p2pswarm.wire.messages import NextHop, PushedStep, Step, StepReply

FAR = Link(latency_s=0.05)


@asynccontextmanager
async def open_sessions(world: ChainWorld) -> AsyncIterator[list[RemoteSession]]:
    """One at each server, `s0`, `s1`, ..."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(world.open_session(index, f"s{index}"))
            for index in range(len(world.servers))
        ]


async def relay(sessions: Sequence[RemoteSession], step_id: int, position: int, row: list[float]) -> list[float]:
    """A step over the chain by way of the client."""
    wire = wire_rows([row])
    for session in sessions:
        reply = await session.step(Step(step_id, position, wire), TIMEOUT_S)
        assert not reply.from_push
        wire = reply.hidden_states
    return read_rows(wire)[0]


async def push(
    world: ChainWorld, sessions: Sequence[RemoteSession], step_id: int, position: int, row: list[float]
) -> list[StepReply]:
    """A step over the chain, pushed from server to server; what each of them answered."""
    hops: list[NextHop | None] = [server.hop(f"s{index}") for index, server in enumerate(world.servers)]
    steps: list[Step | PushedStep] = [Step(step_id, position, wire_rows([row]), push_to=hops[1])]
    steps += [PushedStep(step_id, position, len(row), push_to=hop) for hop in [*hops[2:], None]]
    for session, step in zip(sessions, steps, strict=True):
        await session.send(step)
    return [await session.receive(step, TIMEOUT_S) for session, step in zip(sessions, steps, strict=True)]


async def test_a_token_over_three_servers_takes_four_trips_by_push_and_six_by_relay(autojump_clock: MockClock) -> None:
    async with open_chain_world(3, link=FAR) as world, open_sessions(world) as sessions:
        await push(world, sessions, 0, 0, [1])  # the servers get to know one another
        await trio.sleep(1)
        before_s = trio.current_time()
        for step_id in range(1, 11):
            replies = await push(world, sessions, step_id, step_id, [1])
            assert [reply.from_push for reply in replies] == [False, True, True]
        assert trio.current_time() - before_s == pytest.approx(10 * 4 * 0.05)
        before_s = trio.current_time()
        for step_id in range(11, 21):
            await relay(sessions, step_id, step_id, [1])
        assert trio.current_time() - before_s == pytest.approx(10 * 6 * 0.05)


async def test_pushed_steps_give_what_relayed_ones_give(autojump_clock: MockClock) -> None:
    rows = [[float(step_id), 1.0] for step_id in range(10)]
    async with open_chain_world(3) as world:
        async with open_sessions(world) as sessions:
            pushed = [await push(world, sessions, index, 2 * index, row) for index, row in enumerate(rows)]
        await trio.sleep(1)
        async with open_sessions(world) as sessions:
            relayed = [await relay(sessions, index, 2 * index, row) for index, row in enumerate(rows)]
        assert [read_rows(replies[-1].hidden_states)[0] for replies in pushed] == relayed


async def test_a_chain_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    async with open_chain_world(3) as world:
        async with open_sessions(world) as sessions:
            for step_id in range(5):
                await push(world, sessions, step_id, step_id, [1])
        await world.until_quiet()
