"""The end of a server: nothing new begins, what runs may finish in its grace period, the rest is handed back."""

import itertools

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import ConnectionLost, ServerBusy, SessionLost
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.testing.rpc_world import TIMEOUT_S, World, open_world, step
from p2pswarm.testing.running_sum_service import SUM_MODEL, SUM_SPAN, RunningSumService, read_rows, wire_rows
from p2pswarm.wire.messages import Forward

FORWARD = Forward(SUM_MODEL, SUM_SPAN, wire_rows([[1, 2, 3]]))


async def drain(world: World, grace_s: float) -> float:
    """How long it took."""
    before_s = trio.current_time()
    await world.server.drain(grace_s)
    assert world.server.statistics().num_streams == 0
    assert world.service.num_opened == world.service.num_closed
    return trio.current_time() - before_s


async def test_a_draining_server_refuses_what_is_new_and_goes_on_with_open_sessions(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session("a") as session:
        await step(session, 0, 0, [1])
        world.server.stop_accepting()
        with pytest.raises(ServerBusy, match="is about to stop"):
            await world.client.forward(world.peer_id, FORWARD, TIMEOUT_S)
        with pytest.raises(ServerBusy, match="is about to stop"):
            async with world.open_session("b", other=True):
                pass
        assert await step(session, 1, 1, [1]) == [2]


async def test_an_idle_server_drains_at_once(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        await world.client.forward(world.peer_id, FORWARD, TIMEOUT_S)
        assert await drain(world, 60) < 0.2


async def test_calls_in_work_finish_within_the_grace_period(autojump_clock: MockClock) -> None:
    async with open_world(RunningSumService(delay_s=10)) as world, trio.open_nursery() as nursery:

        async def call() -> None:
            reply = await world.client.forward(world.peer_id, FORWARD, TIMEOUT_S)
            assert read_rows(reply.hidden_states) == [[1, 3, 6]]

        nursery.start_soon(call)
        await trio.sleep(1)
        assert 9 <= await drain(world, 60) < 10


async def test_calls_still_in_work_afterwards_are_told(autojump_clock: MockClock) -> None:
    async with open_world(RunningSumService(delay_s=29)) as world, trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(ServerBusy, match="is about to stop"):
                await world.client.forward(world.peer_id, FORWARD, TIMEOUT_S)

        nursery.start_soon(call)
        await trio.sleep(1)
        assert 5 <= await drain(world, 5) < 6


async def generate_until_lost(session: RemoteSession) -> int:
    """How many exact tokens came before the session was handed back."""
    for index in itertools.count():
        try:
            assert await step(session, index, index, [1]) == [index + 1]
        except SessionLost as error:
            assert "ended the session: the server is about to stop" in str(error)  # noqa: PT017 - after many steps
            return index
    raise AssertionError


async def test_a_session_in_use_goes_on_until_the_grace_period_ends(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session, trio.open_nursery() as nursery:
        nursery.start_soon(drain, world, 3)
        assert await generate_until_lost(session) == 60


async def test_a_session_that_ends_meanwhile_ends_the_wait(autojump_clock: MockClock) -> None:
    async with open_world() as world, trio.open_nursery() as nursery:

        async def generate() -> None:
            async with world.open_session() as session:
                for index in range(20):
                    assert await step(session, index, index, [1]) == [index + 1]

        nursery.start_soon(generate)
        await trio.sleep(0.5)
        assert await drain(world, 60) < 2


async def test_a_resting_session_is_handed_back_at_once(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await step(session, 0, 0, [1])
        await trio.sleep(10)
        assert await drain(world, 60) < 1
        with pytest.raises(SessionLost):
            await step(session, 1, 1, [1])


async def test_a_client_that_takes_no_answers_does_not_hold_up_the_end(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session, trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(SessionLost):
                await step(session, 0, 0, [1])

        world.service.delay_s = 29
        nursery.start_soon(call)
        await trio.sleep(1)
        world.memory.hang(world.network.peer_id)
        assert await drain(world, 5) < 10
        world.memory.resume(world.network.peer_id)


async def test_cancelling_the_server_closes_every_session(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session("a") as one, world.open_session("b", other=True) as other:
        await step(one, 0, 0, [1])
        await step(other, 0, 0, [1])
        world.server_scope.cancel()
        for session in (one, other):
            with pytest.raises(SessionLost):
                await step(session, 1, 1, [1])
        await world.until_quiet()
        with pytest.raises(ConnectionLost):
            await world.client.forward(world.peer_id, FORWARD, TIMEOUT_S)
