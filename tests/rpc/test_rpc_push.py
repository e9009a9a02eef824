"""Pushed steps at one server: every order in which a push, its step and the client's own copy can come."""

from collections.abc import Sequence
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import ConnectionLost, RequestRefused, ServerBusy, SessionLost
from p2pswarm.core.ids import SessionId
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.testing.rpc_world import TIMEOUT_S, World, open_request, open_world, step
from p2pswarm.testing.running_sum_service import RunningSumService, wire_rows
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.frames import encode_frame
from p2pswarm.wire.messages import (
    ErrorCode,
    ErrorReply,
    InfoRequest,
    Push,
    PushedStep,
    SessionOpened,
    Step,
    StepReply,
    WireTensor,
)
from p2pswarm.wire.serialization import encode_message

STEP = PushedStep(1, 2, 1)
COPY = Step(1, 2, wire_rows([[3]]))
"""What the client sends itself where nothing is pushed."""
PUSHED = StepReply(1, 3, wire_rows([[6]]), from_push=True)
COPIED = StepReply(1, 3, wire_rows([[6]]))


async def push(world: World, row: Sequence[float] = (3,), *, step_id: int = 1, session_id: str = "session") -> None:
    """The server before pushes, which here is the other client."""
    await world.other_client.push(
        world.peer_id, Push(SessionId(session_id), step_id, wire_rows([list(row)])), TIMEOUT_S
    )


async def start(session: RemoteSession) -> None:
    """Brings the session to where `STEP` begins."""
    assert await step(session, 0, 0, [1, 2]) == [1, 3]


async def go_on(session: RemoteSession) -> None:
    """The step after `STEP`, whose answer shows what the session has run."""
    assert await step(session, 9, 3, [4]) == [10]


async def test_the_step_may_come_before_its_push(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        await session.send(STEP)
        await trio.sleep(1)
        await push(world)
        assert await session.receive(STEP, TIMEOUT_S) == PUSHED
        await go_on(session)


async def test_the_push_may_come_before_its_step(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session, trio.open_nursery() as nursery:
        await start(session)
        nursery.start_soon(push, world)
        await trio.sleep(1)
        assert world.server.statistics().num_pushes_waiting == 1
        await session.send(STEP)
        assert await session.receive(STEP, TIMEOUT_S) == PUSHED
        assert world.server.statistics().num_pushes_waiting == 0
        await go_on(session)


async def test_the_clients_copy_may_come_before_the_push(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        await session.send(STEP)
        assert await session.reply_within(STEP, 1) is None
        await session.send(COPY)
        assert await session.receive(COPY, TIMEOUT_S) == COPIED
        before_s = trio.current_time()
        await push(world)
        assert trio.current_time() - before_s < 1
        await go_on(session)


async def test_the_clients_copy_may_come_too_late_and_is_not_answered(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        await session.send(STEP)
        await push(world)
        await session.send(COPY)
        assert await session.receive(COPY, TIMEOUT_S) == PUSHED
        assert await session.reply_within(COPY, 5) is None
        await go_on(session)


async def test_the_clients_copy_may_come_while_the_push_is_computed(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        world.service.delay_s = 2
        await session.send(STEP)
        await push(world)
        await session.send(COPY)
        assert await session.receive(COPY, TIMEOUT_S) == PUSHED
        await go_on(session)


async def test_a_second_copy_is_refused(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        for message in (STEP, COPY):
            await session.send(message)
        assert await session.receive(COPY, TIMEOUT_S) == COPIED
        with pytest.raises(RequestRefused, match="step ids rise: 1 came after 1"):
            await session.step(COPY, TIMEOUT_S)
        await go_on(session)


async def test_a_push_that_comes_twice_is_run_once(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session, trio.open_nursery() as nursery:
        await start(session)
        nursery.start_soon(push, world)
        nursery.start_soon(push, world)
        await trio.sleep(1)
        await session.send(STEP)
        assert await session.receive(STEP, TIMEOUT_S) == PUSHED
        await push(world)
        await go_on(session)


async def test_a_stranger_cannot_push_to_a_session_whose_id_he_does_not_know(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        await session.send(STEP)
        with pytest.raises(RequestRefused, match="no session here has this id"):
            await push(world, [666], session_id="guessed")
        assert await session.reply_within(STEP, 1) is None
        await push(world)
        assert await session.receive(STEP, TIMEOUT_S) == PUSHED


async def test_a_push_for_another_step_is_not_taken(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session, trio.open_nursery() as nursery:
        await start(session)
        await session.send(STEP)
        await push(world, [666], step_id=0)
        nursery.start_soon(partial(push, world, [4], step_id=2))
        assert await session.reply_within(STEP, 1) is None
        await session.send(COPY)
        assert await session.receive(COPY, TIMEOUT_S) == COPIED
        newer = PushedStep(2, 3, 1)
        await session.send(newer)
        assert await session.receive(newer, TIMEOUT_S) == StepReply(2, 4, wire_rows([[10]]), from_push=True)


async def test_a_push_that_nobody_asks_for_is_dropped_with_an_error(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        with pytest.raises(RequestRefused, match="step 1 was not asked for within 10 s"):
            await push(world)
        assert world.server.statistics().num_pushes_waiting == 0
        await session.send(STEP)
        assert await session.reply_within(STEP, 1) is None
        await session.send(COPY)
        assert await session.receive(COPY, TIMEOUT_S) == COPIED


@pytest.mark.parametrize("row", [[float("nan")], [1, 2], [1, 2, 3]])
async def test_pushed_hidden_states_that_do_not_fit_are_dropped_and_the_copy_is_taken(
    row: list[float], autojump_clock: MockClock
) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        await session.send(STEP)
        await push(world, row)
        assert await session.reply_within(STEP, 1) is None
        await session.send(COPY)
        assert await session.receive(COPY, TIMEOUT_S) == COPIED
        await go_on(session)


async def test_a_push_that_fits_may_come_after_one_that_does_not(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        await session.send(STEP)
        await push(world, [float("inf")])
        await push(world)
        assert await session.receive(STEP, TIMEOUT_S) == PUSHED
        await go_on(session)


async def test_a_step_that_is_given_up_makes_way_for_the_next(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        await session.send(STEP)
        again = Step(2, 2, wire_rows([[3]]))
        assert await session.step(again, TIMEOUT_S) == StepReply(2, 3, wire_rows([[6]]))
        await push(world, [666])
        await go_on(session)


async def test_an_answer_to_a_step_that_was_given_up_is_passed_over(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        await session.send(STEP)
        await push(world, [666])
        again = Step(2, 2, wire_rows([[3]]))
        assert await session.step(again, TIMEOUT_S) == StepReply(2, 3, wire_rows([[6]]))
        await go_on(session)


async def test_a_step_whose_hidden_states_never_come_is_refused(autojump_clock: MockClock) -> None:
    async with open_world(limits=RpcLimits(call_timeout_s=20)) as world, world.open_session() as session:
        await start(session)
        await session.send(STEP)
        with pytest.raises(RequestRefused, match="the hidden states of step 1 did not come"):
            await session.receive(STEP, TIMEOUT_S)
        again = Step(2, 2, wire_rows([[3]]))
        assert await session.step(again, TIMEOUT_S) == StepReply(2, 3, wire_rows([[6]]))


async def test_nonsense_is_answered_while_a_push_is_waited_for(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        stream = await world.open_raw()
        framed = FramedStream(stream)
        await framed.send(open_request())
        assert await world.hear(framed) == SessionOpened(SessionId("session"))
        await framed.send(PushedStep(0, 0, 1))
        for wrong, complaint in (
            (InfoRequest(), "a session takes steps, not InfoRequest"),
            (PushedStep(0, 0, 1), "step ids rise: 0 came after 0"),
        ):
            await framed.send(wrong)
            assert await world.hear(framed) == ErrorReply(ErrorCode.BAD_REQUEST, complaint)
        await stream.write(*encode_frame({"type": "from_the_future"}))
        answer = await world.hear(framed)
        assert isinstance(answer, ErrorReply)
        assert answer.code is ErrorCode.UNKNOWN_MESSAGE
        await push(world, [5], step_id=0)
        assert await world.hear(framed) == StepReply(0, 1, wire_rows([[5]]), from_push=True)


@pytest.mark.parametrize("ending", ["close", "reset", "garbage"])
async def test_the_end_of_a_session_is_noticed_while_a_push_is_waited_for(
    ending: str, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        stream = await world.open_raw()
        await stream.write(*encode_message(open_request()), *encode_message(PushedStep(0, 0, 1)))
        await trio.sleep(1)
        assert world.server.statistics().num_sessions == 1
        if ending == "close":
            await stream.close_write()
        elif ending == "reset":
            stream.reset()
        else:
            await stream.write(b"\xff" * 100)
        await trio.sleep(1)
        assert world.server.statistics().num_sessions == 0
        assert world.service.num_closed == 1
        with pytest.raises(RequestRefused, match="no session here"):
            await push(world, step_id=0)


async def test_the_end_of_a_session_ends_the_push_that_waits_for_it(autojump_clock: MockClock) -> None:
    async with open_world() as world, trio.open_nursery() as nursery:
        async with world.open_session() as session:
            await start(session)
            nursery.start_soon(push, world)
            await trio.sleep(1)
            assert world.server.statistics().num_pushes_waiting == 1
        before_s = trio.current_time()
        while world.server.statistics().num_sessions:  # noqa: ASYNC110 - the server announces this to nobody
            await trio.sleep(0.01)
        assert trio.current_time() - before_s < 1
        assert world.server.statistics().num_pushes_waiting == 0
        world.client.close()


async def test_a_session_that_waits_for_a_push_is_handed_back_at_the_end_of_a_drain(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session, trio.open_nursery() as nursery:
        await start(session)
        await session.send(STEP)
        await trio.sleep(1)
        nursery.start_soon(world.server.drain, 5)
        with pytest.raises(SessionLost, match="is about to stop"):
            await session.receive(STEP, 10)


async def test_a_draining_server_takes_pushes_for_its_sessions(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session, trio.open_nursery() as nursery:
        await start(session)
        await session.send(STEP)
        await trio.sleep(1)
        nursery.start_soon(world.server.drain, 5)
        await trio.sleep(1)
        await push(world)
        assert await session.receive(STEP, TIMEOUT_S) == PUSHED


async def test_a_waiting_push_is_charged_to_who_pushed_and_a_taken_one_to_the_client(autojump_clock: MockClock) -> None:
    limits = RpcLimits(max_received_bytes_per_peer=5000)
    service = RunningSumService(max_length=2000)
    async with (
        open_world(service, limits) as world,
        world.open_session(max_length=2000) as session,
        world.open_session("more") as more,
        world.open_session("own", other=True) as own,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(partial(push, world, [1.0] * 1000, step_id=0))
        await trio.sleep(1)
        assert world.server.statistics().received_bytes == 4000
        with pytest.raises(ServerBusy, match="requests of one peer may hold 5000 bytes"):
            await own.step(Step(0, 0, wire_rows([[1.0] * 500])), TIMEOUT_S)
        service.delay_s = 5
        long = PushedStep(0, 0, 1000)
        await session.send(long)
        await trio.sleep(1)
        assert world.server.statistics().received_bytes == 4000
        with pytest.raises(ServerBusy, match="requests of one peer may hold 5000 bytes"):
            await more.step(Step(0, 0, wire_rows([[1.0] * 500])), TIMEOUT_S)
        assert (await session.receive(long, TIMEOUT_S)).from_push
        await trio.sleep(1)
        assert world.server.statistics().received_bytes == 0


async def test_a_push_that_its_client_has_no_room_for_is_dropped(autojump_clock: MockClock) -> None:
    limits = RpcLimits(max_received_bytes_per_peer=5000)
    service = RunningSumService(max_length=2000)
    async with (
        open_world(service, limits) as world,
        world.open_session(max_length=2000) as session,
        world.open_session("busy") as busy,
        trio.open_nursery() as nursery,
    ):
        service.delay_s = 10
        nursery.start_soon(busy.step, Step(0, 0, wire_rows([[1.0] * 90])), TIMEOUT_S)
        long = PushedStep(0, 0, 1200)
        await session.send(long)
        await push(world, [1.0] * 1200, step_id=0)
        assert await session.reply_within(long, 5) is None
        await trio.sleep(10)
        service.delay_s = 0
        await push(world, [1.0] * 1200, step_id=0)
        assert (await session.receive(long, TIMEOUT_S)).from_push


async def test_the_mask_of_a_step_that_waits_stays_charged(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        masked = PushedStep(1, 2, 1, position_ids=WireTensor("int64", (1, 1), bytes(8)))
        await session.send(masked)
        await trio.sleep(1)
        assert world.server.statistics().received_bytes == 8
        await push(world)
        assert await session.receive(masked, TIMEOUT_S) == PUSHED
        await trio.sleep(1)
        assert world.server.statistics().received_bytes == 0


async def test_a_thousand_pushes_to_unknown_sessions_are_answered_and_leave_nothing(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await start(session)
        framed = await world.open_framed()
        for number in range(1000):
            await framed.send(Push(SessionId(f"guess-{number}"), number, wire_rows([[1]])))
            answer = await world.hear(framed)
            assert isinstance(answer, ErrorReply)
            assert answer.code is ErrorCode.BAD_REQUEST
        assert world.server.statistics().received_bytes <= 4
        assert world.server.statistics().num_pushes_waiting == 0
        await go_on_from_start(session)


async def test_huge_pushes_are_bounded_by_what_their_sender_may_hold(autojump_clock: MockClock) -> None:
    limits = RpcLimits(max_received_bytes_per_peer=8 << 20)
    async with open_world(limits=limits) as world, trio.open_nursery() as nursery:
        sessions = [await open_by_hand(world, f"s{number}") for number in range(5)]
        outcomes: list[str] = []

        async def push_huge(session_id: str) -> None:
            huge = Push(SessionId(session_id), 0, WireTensor("float32", (1, 1 << 19, 1), bytes(2 << 20)))
            try:
                await world.other_client.push(world.peer_id, huge, 100)
            except (ServerBusy, ConnectionLost, RequestRefused) as error:
                outcomes.append(type(error).__name__)

        for number in range(5):
            nursery.start_soon(push_huge, f"s{number}")
        await trio.sleep(5)
        statistics = world.server.statistics()
        assert statistics.received_bytes <= 8 << 20
        assert statistics.num_pushes_waiting == 4
        assert len(outcomes) == 1
        await trio.sleep(10)
        assert sorted(outcomes[1:]) == ["RequestRefused"] * 4
        assert world.server.statistics().received_bytes < 100
        for framed in sessions:
            framed.reset()


async def open_by_hand(world: World, session_id: str) -> FramedStream:
    framed = await world.open_framed()
    await framed.send(open_request(session_id))
    assert await world.hear(framed) == SessionOpened(SessionId(session_id))
    return framed


async def go_on_from_start(session: RemoteSession) -> None:
    assert await step(session, 9, 2, [3]) == [6]
