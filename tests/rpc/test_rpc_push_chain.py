"""Chains of servers that push to one another: what a token costs, and that its sums are right whatever fails."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import RequestRefused
from p2pswarm.core.ids import PeerId, SessionId
from p2pswarm.rpc.dial_guard import MAX_DIALS_PER_ASKER
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


async def test_servers_learn_from_their_clients_where_the_next_one_is(autojump_clock: MockClock) -> None:
    async with open_chain_world(2) as world, open_sessions(world) as sessions:
        first, second = world.servers
        assert second.peer_id not in first.node.connected_peers
        await push(world, sessions, 0, 0, [1])
        assert second.peer_id in first.node.connected_peers
        for step_id in range(1, 10):
            await push(world, sessions, step_id, step_id, [1])
        assert second.server.statistics().num_streams_served == 2  # the session, and one for all pushes


async def test_a_client_cannot_have_a_server_dial_many(autojump_clock: MockClock) -> None:
    async with open_chain_world(12) as world, world.open_session(0, "s0") as session:
        for step_id, target in enumerate(world.servers[1:]):
            await session.step(Step(step_id, step_id, wire_rows([[1]]), push_to=target.hop("unknown")), TIMEOUT_S)
            await trio.sleep(0.2)
        assert len(world.servers[0].node.connected_peers) == 1 + MAX_DIALS_PER_ASKER


async def test_a_next_server_that_is_not_there_costs_the_session_nothing(autojump_clock: MockClock) -> None:
    nobody = NextHop(PeerId("nobody"), SessionId("s1"), ("/ip4/10.9.9.9/tcp/4001", "nonsense"))
    async with open_chain_world(1) as world, world.open_session(0, "s0") as session:
        before_s = trio.current_time()
        for step_id in range(20):
            reply = await session.step(Step(step_id, step_id, wire_rows([[1]]), push_to=nobody), TIMEOUT_S)
            assert read_rows(reply.hidden_states) == [[step_id + 1]]
        assert trio.current_time() - before_s == pytest.approx(20 * 0.05)


async def test_a_next_server_that_hangs_costs_the_session_nothing(autojump_clock: MockClock) -> None:
    async with open_chain_world(2) as world, open_sessions(world) as sessions:
        await push(world, sessions, 0, 0, [1])
        _, second = world.servers
        world.memory.hang(second.peer_id)
        before_s = trio.current_time()
        for step_id in range(1, 20):
            step = Step(step_id, step_id, wire_rows([[1]]), push_to=second.hop("s1"))
            assert read_rows((await sessions[0].step(step, TIMEOUT_S)).hidden_states) == [[step_id + 1]]
        assert trio.current_time() - before_s == pytest.approx(19 * 0.05)
        world.memory.resume(second.peer_id)


async def test_a_failed_step_is_not_pushed(autojump_clock: MockClock) -> None:
    async with open_chain_world(2) as world, open_sessions(world) as sessions:
        first, second = world.servers
        with pytest.raises(RequestRefused, match="not finite"):
            await sessions[0].step(Step(0, 0, wire_rows([[float("nan")]]), push_to=second.hop("s1")), TIMEOUT_S)
        assert second.peer_id not in first.node.connected_peers
