"""Single calls: answers, errors by class, deadlines, and streams that are used again."""

import dataclasses

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import (
    BadAnswer,
    ConnectionLost,
    DeadlineExceeded,
    PeerUnreachable,
    ProtocolViolation,
    RequestRefused,
    ServerBusy,
    ServerFailed,
)
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.span import Span
from p2pswarm.net.network import Stream
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.testing.rpc_world import TIMEOUT_S, open_world
from p2pswarm.testing.running_sum_service import (
    SUM_MODEL,
    SUM_SPAN,
    RunningSumService,
    read_rows,
    sum_server_info,
    wire_rows,
)
from p2pswarm.wire.messages import ErrorCode, Forward, ForwardReply, InfoReply, SessionOpened, WireTensor
from p2pswarm.wire.serialization import encode_message

BATCH = Forward(SUM_MODEL, SUM_SPAN, wire_rows([[1, 2, 3], [4, 5, 6]]))


class HonestService(RunningSumService):
    """Knows who it is."""

    peer_id: PeerId

    async def info(self, peer_id: PeerId) -> InfoReply:
        return InfoReply(sum_server_info(self.peer_id))


async def test_forward_gives_the_answer(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        reply = await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)
        assert read_rows(reply.hidden_states) == [[1, 3, 6], [4, 9, 15]]


async def test_info_gives_what_the_server_says_of_itself_and_only_of_itself(autojump_clock: MockClock) -> None:
    service = HonestService()
    async with open_world(service) as world:
        service.peer_id = world.peer_id
        assert (await world.client.info(world.peer_id, TIMEOUT_S)).info == sum_server_info(world.peer_id)
        service.peer_id = PeerId("impostor")
        with pytest.raises(BadAnswer, match="says that it is impostor"):
            await world.client.info(world.peer_id, TIMEOUT_S)


async def test_a_second_call_costs_one_round_trip(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)
        before_s = trio.current_time()
        for _ in range(10):
            await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)
        assert trio.current_time() - before_s == pytest.approx(10 * 0.05)
        assert world.server.statistics().num_streams_served == 1


async def test_calls_at_once_take_streams_of_their_own_and_a_few_are_kept(autojump_clock: MockClock) -> None:
    async with open_world(RunningSumService(delay_s=1.0)) as world:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(world.client.forward, world.peer_id, BATCH, TIMEOUT_S)
        await trio.sleep(1)
        assert world.server.statistics().num_streams == 4
        assert world.server.statistics().num_streams_served == 10


async def test_idle_streams_are_closed_by_either_side(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)
        await trio.sleep(61)
        await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)
        assert world.server.statistics().num_streams_served == 2
        await trio.sleep(121)
        assert world.server.statistics().num_streams == 0
        await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)
        world.client.close()
        await world.until_quiet()


async def test_a_kept_stream_that_the_server_closed_is_replaced_unseen(autojump_clock: MockClock) -> None:
    async with open_world(limits=RpcLimits(idle_stream_timeout_s=5)) as world:
        for _ in range(3):
            reply = await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)
            assert read_rows(reply.hidden_states) == [[1, 3, 6], [4, 9, 15]]
            await trio.sleep(10)
        assert world.server.statistics().num_streams_served == 3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_id": ModelId("other@1")}, "this server has running-sum@0123456789abcdef, not other@1"),
        ({"span": Span(2, 9)}, "this server has blocks 0:4, not 2:9"),
        ({"hidden_states": WireTensor("float32", (1, 1, 2), bytes(8))}, "got float32 of hidden size 2"),
        ({"hidden_states": WireTensor("float16", (1, 1, 1), bytes(2))}, "got float16"),
    ],
)
async def test_wrong_requests_are_refused_with_the_reason(
    changes: dict[str, object], complaint: str, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        with pytest.raises(RequestRefused, match=complaint) as caught:
            await world.client.forward(world.peer_id, dataclasses.replace(BATCH, **changes), TIMEOUT_S)
        assert caught.value.peer_id == world.peer_id
        assert await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)


async def test_a_failure_of_the_server_is_logged_there_and_not_told(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    class Broken(RunningSumService):
        async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply:
            raise RuntimeError("disk /dev/secret is gone")

    async with open_world(Broken()) as world:
        with pytest.raises(ServerFailed, match="the server failed; its log says why") as caught:
            await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)
        assert "secret" not in str(caught.value)
        assert "disk /dev/secret is gone" in caplog.text


async def test_a_busy_server_says_so(autojump_clock: MockClock) -> None:
    class Busy(RunningSumService):
        async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply:
            raise ServerBusy("come back later")

    async with open_world(Busy()) as world:
        with pytest.raises(ServerBusy, match="come back later"):
            await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)


async def test_a_late_answer_is_an_error_and_its_stream_is_not_used_again(autojump_clock: MockClock) -> None:
    async with open_world(RunningSumService(delay_s=10)) as world:
        with pytest.raises(DeadlineExceeded, match="did not answer Forward within 2 s"):
            await world.client.forward(world.peer_id, BATCH, 2.0)
        world.service.delay_s = 0
        other = Forward(SUM_MODEL, SUM_SPAN, wire_rows([[7]]))
        assert read_rows((await world.client.forward(world.peer_id, other, TIMEOUT_S)).hidden_states) == [[7]]


async def test_a_cancelled_call_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    async with open_world(RunningSumService(delay_s=10)) as world:
        with trio.move_on_after(1):
            await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)
        await world.until_quiet()


async def test_the_server_gives_up_on_a_call_that_takes_too_long(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with open_world(RunningSumService(delay_s=100), RpcLimits(call_timeout_s=3)) as world:
        with pytest.raises(ServerFailed, match="did not manage in time"):
            await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)
        assert world.service.num_working == 0
        assert "a request of" in caplog.text


async def test_peers_that_are_gone_are_told_apart(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        with pytest.raises(PeerUnreachable):
            await world.client.forward(PeerId("nobody"), BATCH, TIMEOUT_S)
        world.service.delay_s = 5
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(ConnectionLost):
                    await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)

            nursery.start_soon(call)
            await trio.sleep(1)
            world.memory.kill(world.peer_id)


@pytest.mark.parametrize(
    ("answer", "error", "complaint"),
    [
        (ForwardReply(wire_rows([[1, 2, 3]])), BadAnswer, r"answered float32 of shape \[1, 3, 1\] by codec none"),
        (SessionOpened("s"), ProtocolViolation, "answered Forward by SessionOpened"),
        (BATCH, ProtocolViolation, "answered Forward by Forward"),
        (None, ConnectionLost, "closed the stream without an answer"),
    ],
)
async def test_answers_that_do_not_fit_are_refused(
    answer: object, error: type[Exception], complaint: str, autojump_clock: MockClock
) -> None:
    async with open_world() as world:

        async def answer_anything(stream: Stream) -> None:
            await stream.read()
            if answer is not None:
                await stream.write(*encode_message(answer))
            await stream.close_write()

        world.serve_instead(answer_anything)
        with pytest.raises(error, match=complaint):
            await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)


async def test_refusals_are_counted_by_what_the_peer_is_told(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        await world.client.forward(world.peer_id, BATCH, TIMEOUT_S)
        assert world.server.statistics().errors == {}
        for _ in range(2):
            with pytest.raises(RequestRefused):
                await world.client.forward(
                    world.peer_id, dataclasses.replace(BATCH, model_id=ModelId("other@0")), TIMEOUT_S
                )
        assert world.server.statistics().errors == {ErrorCode.BAD_REQUEST: 2}


async def test_sessions_are_counted_by_peer(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        async with world.open_session("one"), world.open_session("two"), world.open_session("three", other=True):
            sessions = world.server.statistics().sessions_by_peer
            assert sorted(sessions.values()) == [1, 2]
        await world.until_quiet()
        assert world.server.statistics().sessions_by_peer == {}
