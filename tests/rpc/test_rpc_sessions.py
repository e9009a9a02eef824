"""Sessions: steps and rollback, what a session survives and what ends it, and that it is closed once in any case."""

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import (
    BadAnswer,
    BadRequest,
    ConnectionLost,
    DeadlineExceeded,
    RequestRefused,
    ServerBusy,
    ServerFailed,
    SessionClosed,
    SessionLost,
)
from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.net.network import Stream
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.rpc.remote_session import complaint_about
from p2pswarm.testing.rpc_world import TIMEOUT_S, open_request, open_world, step
from p2pswarm.testing.running_sum_service import SUM_SPAN, RunningSumService, RunningSumSession, wire_rows
from p2pswarm.wire.frames import encode_frame
from p2pswarm.wire.messages import (
    Codec,
    ErrorCode,
    ErrorReply,
    InfoRequest,
    OpenSession,
    PushedStep,
    SessionOpened,
    Step,
    StepReply,
    WireTensor,
)


async def test_steps_build_on_one_another_and_positions_go_back(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        async with world.open_session() as session:
            assert await step(session, 0, 0, [1, 2, 3]) == [1, 3, 6]
            assert await step(session, 1, 3, [4]) == [10]
            assert await step(session, 2, 1, [10]) == [11]
            assert await step(session, 3, 2, []) == []
            assert await step(session, 4, 2, [5]) == [16]
        await world.until_quiet()


async def test_a_step_costs_one_round_trip_and_a_session_takes_over_a_kept_stream(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session("a") as session:
        before_s = trio.current_time()
        for index in range(10):
            await step(session, index, index, [1])
        assert trio.current_time() - before_s == pytest.approx(10 * 0.05)


async def test_sessions_do_not_mix(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        async with world.open_session("a") as one, world.open_session("b", other=True) as other:
            for index in range(20):
                assert await step(one, index, index, [1]) == [index + 1]
                assert await step(other, index, index, [100]) == [100 * (index + 1)]
        await world.until_quiet()


@pytest.mark.parametrize(
    ("position", "row", "complaint"),
    [(4, [1], "position 4 is beyond the 3 tokens"), (3, [1] * 98, "room for 100 tokens")],
)
async def test_a_refused_step_changes_nothing(
    position: int, row: list[float], complaint: str, autojump_clock: MockClock
) -> None:
    async with open_world() as world, world.open_session() as session:
        await step(session, 0, 0, [1, 2, 3])
        with pytest.raises(RequestRefused, match=complaint):
            await step(session, 1, position, row)
        assert not session.is_over
        assert await step(session, 2, 3, [4]) == [10]


async def test_step_ids_rise(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await step(session, 5, 0, [1])
        with pytest.raises(RequestRefused, match="step ids rise: 5 came after 5"):
            await step(session, 5, 1, [1])
        assert await step(session, 6, 1, [1]) == [2]


async def test_a_session_takes_nothing_but_steps_and_survives_the_rest(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        framed = await world.open_framed()
        await framed.send(open_request())
        assert await world.hear(framed) == SessionOpened(SessionId("session"))
        for wrong in (InfoRequest(), open_request("another"), ErrorReply(ErrorCode.BUSY, "me too")):
            await framed.send(wrong)
            answer = await world.hear(framed)
            assert isinstance(answer, ErrorReply)
            assert answer.code is ErrorCode.BAD_REQUEST
            assert "a session takes steps, not" in answer.message
        await framed.send(Step(0, 0, wire_rows([[1, 2]])))
        assert await world.hear(framed) == StepReply(0, 2, wire_rows([[1, 3]]))
        await framed.close_write()
        assert await world.hear(framed) is None
        await world.until_quiet()


@pytest.mark.parametrize("request_changes", [{"model_id": ModelId("other@1")}, {"max_length": 1001}])
async def test_a_refused_session_costs_nothing(request_changes: dict[str, object], autojump_clock: MockClock) -> None:
    asked = {"model_id": "running-sum@0123456789abcdef", "max_length": 10, **request_changes}
    async with open_world() as world:
        request = OpenSession(SessionId("s"), span=SUM_SPAN, batch_size=1, **asked)
        with pytest.raises(RequestRefused):
            async with world.client.open_session(world.peer_id, request, TIMEOUT_S):
                pass
        assert world.service.num_opened == 0
        await world.until_quiet()


async def test_a_full_server_refuses_sessions_until_one_ends(autojump_clock: MockClock) -> None:
    async with open_world(RunningSumService(max_sessions=1)) as world:
        async with world.open_session("a") as session:
            with pytest.raises(ServerBusy, match="no room for more than 1 sessions"):
                async with world.open_session("b", other=True):
                    pass
            assert await step(session, 0, 0, [1]) == [1]
        async with world.open_session("b", other=True) as session:
            assert await step(session, 0, 0, [2]) == [2]


async def test_an_idle_session_is_lost_and_its_owner_told(autojump_clock: MockClock) -> None:
    async with open_world(limits=RpcLimits(idle_session_timeout_s=60)) as world, world.open_session() as session:
        await step(session, 0, 0, [1])
        await trio.sleep(59)
        await step(session, 1, 1, [1])
        await trio.sleep(61)
        assert world.service.num_closed == 1
        with pytest.raises(SessionLost, match=r"ended the session: no message came from \w+ for 60 s"):
            await step(session, 2, 2, [1])
        with pytest.raises(SessionClosed, match="is over"):
            await step(session, 3, 2, [1])


async def test_a_session_that_never_begins_is_lost_sooner(autojump_clock: MockClock) -> None:
    limits = RpcLimits(first_step_timeout_s=20, idle_session_timeout_s=60)
    async with open_world(limits=limits) as world, world.open_session() as session:
        await trio.sleep(19)
        assert world.service.num_closed == 0
        await trio.sleep(2)
        assert world.service.num_closed == 1
        with pytest.raises(SessionLost, match=r"no message came from \w+ for 20 s"):
            await step(session, 0, 0, [1])


async def test_a_late_step_ends_the_session_at_both_ends(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await step(session, 0, 0, [1])
        world.service.delay_s = 10
        with pytest.raises(DeadlineExceeded, match="did not answer a step within 1 s"):
            await session.step(Step(1, 1, wire_rows([[1]])), timeout_s=1.0)
        assert session.is_over
        await world.until_quiet()


async def test_a_cancelled_step_ends_the_session_at_both_ends(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        world.service.delay_s = 10
        with trio.move_on_after(1):
            await step(session, 0, 0, [1])
        assert session.is_over
        await world.until_quiet()


async def test_two_steps_at_once_are_a_mistake_of_ours(autojump_clock: MockClock) -> None:
    async with open_world(RunningSumService(delay_s=1)) as world, world.open_session() as session:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(step, session, 0, 0, [1])
            await trio.sleep(0.1)
            with pytest.raises(trio.BusyResourceError):
                await step(session, 1, 1, [1])
        assert await step(session, 2, 1, [1]) == [2]


@pytest.mark.parametrize("victim", ["server", "client"])
async def test_a_session_ends_with_the_nodes_that_hold_it(victim: str, autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await step(session, 0, 0, [1])
        world.memory.kill(world.peer_id if victim == "server" else world.network.peer_id)
        with pytest.raises(ConnectionLost):
            await step(session, 1, 1, [1])
        await world.until_quiet()


async def test_a_hung_client_loses_its_session_and_nothing_remains(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session() as session:
        await step(session, 0, 0, [1])
        world.memory.hang(world.network.peer_id)
        await world.until_quiet()
        assert world.service.num_closed == 1
        world.memory.resume(world.network.peer_id)


async def test_an_answer_may_be_waited_for_in_parts(autojump_clock: MockClock) -> None:
    async with open_world(RunningSumService(delay_s=1)) as world, world.open_session() as session:
        first = Step(0, 0, wire_rows([[1, 2]]))
        await session.send(first)
        assert await session.reply_within(first, 0.5) is None
        assert await session.reply_within(first, 0.5) is None
        assert await session.reply_within(first, 0.5) == StepReply(0, 2, wire_rows([[1, 3]]))
        assert await step(session, 1, 2, [3]) == [6]


async def test_a_step_that_is_never_answered_ends_the_session(autojump_clock: MockClock) -> None:
    async with open_world(RunningSumService(delay_s=10)) as world, world.open_session() as session:
        first = Step(0, 0, wire_rows([[1, 2]]))
        await session.send(first)
        with pytest.raises(DeadlineExceeded, match="did not answer a step within 2 s"):
            await session.receive(first, 2)
        assert session.is_over
        with pytest.raises(SessionClosed):
            await session.send(first)


async def test_a_step_that_is_not_taken_ends_the_session(autojump_clock: MockClock) -> None:
    async with open_world() as world, world.open_session(max_length=1000, batch_size=1000) as session:
        world.memory.hang(world.peer_id)
        with pytest.raises(DeadlineExceeded, match="did not take a step within 2 s"):
            await session.send(Step(0, 0, WireTensor("float32", (1000, 1000, 1), bytes(4_000_000))), 2)
        assert session.is_over
        world.memory.resume(world.peer_id)


async def test_a_client_learns_whether_its_server_pushes(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        async with world.open_session() as session:
            assert session.can_push

        async def answer_as_of_old(stream: Stream) -> None:
            await stream.read()
            opened = {"type": "session_opened", "version": 1, "session_id": "session"}
            await stream.write(*encode_frame(opened))
            await trio.sleep(1)

        world.serve_instead(answer_as_of_old)
        async with world.open_session() as session:
            assert not session.can_push


class FailingService(RunningSumService):
    """Sessions that raise what they are told to."""

    error: Exception | None = None
    close_error: Exception | None = None

    async def open_session(self, peer_id: PeerId, request: OpenSession) -> RunningSumSession:
        await super().open_session(peer_id, request)
        return FailingSession(self, request)


class FailingSession(RunningSumSession):
    async def step(self, step: Step) -> StepReply:
        if self._service.error is not None:
            raise self._service.error
        return await super().step(step)

    async def close(self) -> None:
        await super().close()
        if self._service.close_error is not None:
            raise self._service.close_error


@pytest.mark.parametrize(
    ("error", "expected"), [(BadRequest("no such thing"), RequestRefused), (ServerBusy("queue is full"), ServerBusy)]
)
async def test_a_session_survives_what_its_service_refuses(
    error: Exception, expected: type[Exception], autojump_clock: MockClock
) -> None:
    service = FailingService()
    async with open_world(service) as world, world.open_session() as session:
        await step(session, 0, 0, [1])
        service.error = error
        with pytest.raises(expected, match=str(error)):
            await step(session, 1, 1, [1])
        service.error = None
        assert await step(session, 2, 1, [1]) == [2]


async def test_a_failed_step_ends_the_session_and_no_other(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    service = FailingService()
    async with open_world(service) as world, world.open_session("a", other=True) as neighbour:
        async with world.open_session("b") as session:
            service.error = RuntimeError("out of memory")
            with pytest.raises(ServerFailed, match="its log says why"):
                await step(session, 0, 0, [1])
            service.error = None
            with pytest.raises(SessionClosed):
                await step(session, 1, 0, [1])
        await trio.sleep(1)
        assert service.num_closed == 1
        assert await step(neighbour, 0, 0, [1]) == [1]
    assert "out of memory" in caplog.text


async def test_a_session_that_fails_to_close_harms_nobody(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    service = FailingService()
    service.close_error = RuntimeError("cannot close")
    async with open_world(service) as world:
        async with world.open_session() as session:
            await step(session, 0, 0, [1])
        await world.until_quiet()
    assert "cannot close" in caplog.text


STEP = Step(3, 5, WireTensor("float32", (1, 2, 1), bytes(8)))
PUSHED_STEP = PushedStep(3, 5, 2)


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (StepReply(3, 7, STEP.hidden_states), None),
        (StepReply(2, 7, STEP.hidden_states), "step 2, not 3"),
        (StepReply(3, 6, STEP.hidden_states), "position 6 to 2 tokens from 5 on"),
        (StepReply(3, 7, WireTensor("float32", (1, 1, 1), bytes(4))), "shape [1, 1, 1] to ones of [1, 2, 1]"),
        (StepReply(3, 7, WireTensor("float16", (1, 2, 1), bytes(4))), "float16 to ones of float32"),
        (StepReply(3, 7, WireTensor("float32", (1, 2, 1), bytes(4), Codec.FLOAT16)), "by codec float16, not none"),
    ],
)
def test_an_answer_is_held_against_its_step(reply: StepReply, complaint: str | None) -> None:
    found = complaint_about(reply, STEP, open_request())
    assert (found is None) == (complaint is None)
    assert complaint is None or complaint in str(found)


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (StepReply(3, 7, WireTensor("float32", (1, 2, 1), bytes(8)), from_push=True), None),
        (StepReply(3, 7, WireTensor("float16", (1, 2, 9), bytes(36))), None),
        (StepReply(2, 7, STEP.hidden_states), "step 2, not 3"),
        (StepReply(3, 6, STEP.hidden_states), "position 6 to 2 tokens from 5 on"),
        (StepReply(3, 7, WireTensor("float32", (1, 1, 1), bytes(4))), "shape [1, 1, 1] to 1 rows of 2 tokens"),
        (StepReply(3, 7, WireTensor("float32", (1, 2, 1), bytes(4), Codec.FLOAT16)), "by codec float16, not none"),
    ],
)
def test_an_answer_to_a_pushed_step_is_held_against_what_is_known(reply: StepReply, complaint: str | None) -> None:
    found = complaint_about(reply, PUSHED_STEP, open_request())
    assert (found is None) == (complaint is None)
    assert complaint is None or complaint in str(found)


async def test_an_answer_that_does_not_fit_ends_the_session(autojump_clock: MockClock) -> None:
    class Liar(RunningSumSession):
        async def step(self, step: Step) -> StepReply:
            reply = await super().step(step)
            return StepReply(reply.step_id, reply.position + 1, reply.hidden_states)

    class LyingService(RunningSumService):
        async def open_session(self, peer_id: PeerId, request: OpenSession) -> RunningSumSession:
            await super().open_session(peer_id, request)
            return Liar(self, request)

    async with open_world(LyingService()) as world, world.open_session() as session:
        with pytest.raises(BadAnswer, match="position 2 to 1 tokens from 0 on") as caught:
            await step(session, 0, 0, [1])
        assert caught.value.peer_id == world.peer_id
        assert session.is_over
        await world.until_quiet()
