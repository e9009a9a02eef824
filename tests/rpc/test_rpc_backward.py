"""Backward calls and tunings: gradients come back, hostile ones are refused, servers too old for them are noticed."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import BadAnswer, DeadlineExceeded, RequestRefused, ServerBusy, ServerFailed
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.span import Span
from p2pswarm.net.network import Stream
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.testing.rpc_world import TIMEOUT_S, World, open_request, open_world
from p2pswarm.testing.running_sum_service import (
    SUM_MODEL,
    SUM_SPAN,
    RunningSumService,
    RunningSumSession,
    read_rows,
    wire_rows,
)
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.frames import encode_frame
from p2pswarm.wire.messages import (
    Backward,
    BackwardReply,
    Codec,
    ErrorCode,
    ErrorReply,
    Forward,
    ForwardReply,
    Message,
    OpenSession,
    SessionOpened,
    Step,
    StepReply,
    WireTensor,
)
from p2pswarm.wire.serialization import encode_message
from p2pswarm.wire.tuning import TunedLayer, WireTuning

PROMPTS = WireTuning(wire_rows([[10, 20]] * 4))
"""In front of four blocks, so 40 for the first token and 80 for the second."""
MATRIX = WireTensor("float32", (1, 1), bytes(4))
LAYERS = WireTuning(layers=(TunedLayer(0, "mlp.up_proj", MATRIX, MATRIX),))
BATCH = wire_rows([[1, 2, 3], [4, 5, 6]])
GRADIENTS = wire_rows([[1, 1, 1], [0, 0, 2]])
BACKWARD = Backward(SUM_MODEL, SUM_SPAN, BATCH, GRADIENTS)


async def test_backward_gives_the_gradients_of_the_batch(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        reply = await world.client.backward(world.peer_id, BACKWARD, TIMEOUT_S)
        assert read_rows(reply.grad_inputs) == [[3, 2, 1], [2, 2, 2]]
        assert reply.grad_tuning is None


async def test_a_tuning_is_applied_and_its_gradient_comes_back(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        forward = Forward(SUM_MODEL, SUM_SPAN, BATCH, tuning=PROMPTS)
        reply = await world.client.forward(world.peer_id, forward, TIMEOUT_S)
        assert read_rows(reply.hidden_states) == [[41, 123, 126], [44, 129, 135]]
        back = await world.client.backward(world.peer_id, replace(BACKWARD, tuning=PROMPTS), TIMEOUT_S)
        assert back.grad_tuning is not None
        assert back.grad_tuning.prompts is not None
        assert read_rows(back.grad_tuning.prompts) == [[5, 4]] * 4
        plain = await world.client.forward(world.peer_id, Forward(SUM_MODEL, SUM_SPAN, BATCH), TIMEOUT_S)
        assert read_rows(plain.hidden_states) == [[1, 3, 6], [4, 9, 15]]


async def test_a_session_goes_through_the_tuning_it_was_opened_with(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        request = replace(open_request(), tuning=PROMPTS)
        async with world.client.open_session(world.peer_id, request, TIMEOUT_S) as session:
            first = await session.step(Step(0, 0, wire_rows([[1]])), TIMEOUT_S)
            second = await session.step(Step(1, 1, wire_rows([[1, 1]])), TIMEOUT_S)
            assert read_rows(first.hidden_states) + read_rows(second.hidden_states) == [[41], [122, 123]]


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (replace(BACKWARD, model_id=ModelId("other@1")), "this server has running-sum@0123456789abcdef, not other@1"),
        (replace(BACKWARD, span=Span(2, 9)), "this server has blocks 0:4, not 2:9"),
        (replace(BACKWARD, tuning=LAYERS), "have no layers to tune"),
        (Forward(SUM_MODEL, SUM_SPAN, BATCH, tuning=LAYERS), "have no layers to tune"),
        (replace(open_request(), tuning=LAYERS), "have no layers to tune"),
    ],
)
async def test_wrong_requests_to_train_are_refused_with_the_reason(
    request_: Backward | Forward | OpenSession, complaint: str, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        with pytest.raises(RequestRefused, match=complaint):
            await ask(world, request_)
        assert await world.client.backward(world.peer_id, BACKWARD, TIMEOUT_S)


async def ask(world: World, request: Backward | Forward | OpenSession) -> None:
    match request:
        case Backward():
            await world.client.backward(world.peer_id, request, TIMEOUT_S)
        case Forward():
            await world.client.forward(world.peer_id, request, TIMEOUT_S)
        case OpenSession():
            async with world.client.open_session(world.peer_id, request, TIMEOUT_S):
                pass


@pytest.mark.parametrize(
    ("error", "seen"), [(ServerBusy("later"), ServerBusy), (RuntimeError("out of memory"), ServerFailed)]
)
async def test_a_server_that_cannot_go_back_says_so(
    error: Exception, seen: type[Exception], autojump_clock: MockClock
) -> None:
    class Unable(RunningSumService):
        async def backward(self, peer_id: PeerId, request: Backward) -> BackwardReply:
            raise error

    async with open_world(Unable()) as world:
        with pytest.raises(seen):
            await world.client.backward(world.peer_id, BACKWARD, TIMEOUT_S)
        assert await world.client.forward(world.peer_id, Forward(SUM_MODEL, SUM_SPAN, BATCH), TIMEOUT_S)


async def test_backward_has_a_deadline_at_either_end(autojump_clock: MockClock) -> None:
    async with open_world(RunningSumService(delay_s=100), RpcLimits(call_timeout_s=3)) as world:
        with pytest.raises(DeadlineExceeded, match="did not answer Backward within 2 s"):
            await world.client.backward(world.peer_id, BACKWARD, 2.0)
        await trio.sleep(2)
        assert world.service.num_working == 0
        with pytest.raises(ServerFailed, match="did not manage in time"):
            await world.client.backward(world.peer_id, BACKWARD, TIMEOUT_S)
        assert world.service.num_working == 0


async def test_a_server_that_is_about_to_stop_begins_no_backward(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.server.stop_accepting()
        with pytest.raises(ServerBusy, match="about to stop"):
            await world.client.backward(world.peer_id, BACKWARD, TIMEOUT_S)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (
            BackwardReply(wire_rows([[1, 2, 3]]), PROMPTS),
            r"float32 of shape \[1, 3, 1\] by codec none, wanted float32 of",
        ),
        (BackwardReply(WireTensor("float16", (2, 3, 1), bytes(12)), PROMPTS), "answered float16"),
        (BackwardReply(WireTensor("float32", (2, 3, 1), bytes(12), Codec.BFLOAT16), PROMPTS), "by codec bfloat16"),
        (BackwardReply(BATCH), "gradients of other parts than the tuning has"),
        (BackwardReply(BATCH, LAYERS), "gradients of other parts"),
        (BackwardReply(BATCH, WireTuning(wire_rows([[10, 20, 30]] * 4))), "gradients of other parts"),
    ],
)
async def test_gradients_that_do_not_fit_are_refused(
    answer: BackwardReply, complaint: str, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        world.serve_instead(answering(b"".join(encode_message(answer))))
        with pytest.raises(BadAnswer, match=complaint):
            await world.client.backward(world.peer_id, replace(BACKWARD, tuning=PROMPTS), TIMEOUT_S)


def answering(answer: bytes) -> Callable[[Stream], object]:
    async def handle(stream: Stream) -> None:
        await stream.read()
        await stream.write(answer)
        await stream.close_write()

    return handle


def as_version(version: int, message: Message) -> bytes:
    """The message as a node of that version sends it."""
    header, *body = encode_message(message)
    return bytes(header).replace(b"\xa7version\x04", b"\xa7version" + bytes([version])) + b"".join(map(bytes, body))


UNKNOWN = ErrorReply(ErrorCode.UNKNOWN_MESSAGE, "a message of unknown type 'backward'")


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (BACKWARD, UNKNOWN),
        (Forward(SUM_MODEL, SUM_SPAN, BATCH, tuning=PROMPTS), ForwardReply(BATCH)),
        (replace(open_request(), tuning=PROMPTS), SessionOpened(open_request().session_id)),
    ],
)
async def test_a_server_too_old_for_tunings_is_told_from_one_that_applied_it(
    request_: Backward | Forward | OpenSession, answer: Message, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        world.serve_instead(answering(as_version(3, answer)))
        with pytest.raises(BadAnswer, match=r"speaks protocol versions up to 3 and cannot train .* which takes 4"):
            await ask(world, request_)


async def test_a_server_of_the_last_version_still_serves_who_brings_nothing(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.serve_instead(answering(as_version(3, ForwardReply(BATCH))))
        await world.client.forward(world.peer_id, Forward(SUM_MODEL, SUM_SPAN, BATCH), TIMEOUT_S)


async def test_a_client_of_an_older_version_is_served_and_one_too_old_hears_why(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        stream = await world.open_raw()
        framed = FramedStream(stream)
        await stream.write(as_version(3, Forward(SUM_MODEL, SUM_SPAN, BATCH)))
        assert await world.hear(framed) == ForwardReply(wire_rows([[1, 3, 6], [4, 9, 15]]))
        for request in (Forward(SUM_MODEL, SUM_SPAN, BATCH), BACKWARD):
            await stream.write(as_version(0, request))
            answer = await world.hear(framed)
            assert isinstance(answer, ErrorReply)
            assert answer.code is ErrorCode.UNSUPPORTED_VERSION
            assert "speaks protocol versions up to 0, this node from 1 to 4" in answer.message


async def test_a_backward_is_charged_until_it_is_answered(autojump_clock: MockClock) -> None:
    limits = RpcLimits(max_received_bytes_per_peer=1 << 20)
    tokens = WireTensor("float32", (1, 75_000, 1), bytes(300_000))
    request = Backward(SUM_MODEL, SUM_SPAN, tokens, tokens)
    async with open_world(RunningSumService(delay_s=5), limits) as world, trio.open_nursery() as nursery:
        nursery.start_soon(world.client.backward, world.peer_id, request, TIMEOUT_S)
        await trio.sleep(4)
        assert world.server.statistics().received_bytes == 600_000
        with pytest.raises(ServerBusy, match="requests of one peer may hold 1048576 bytes"):
            await world.client.backward(world.peer_id, request, TIMEOUT_S)
        await trio.sleep(10)
        assert world.server.statistics().received_bytes == 0
        await world.client.backward(world.peer_id, request, TIMEOUT_S)


async def test_what_a_session_was_opened_with_is_not_held_besides_by_its_stream(autojump_clock: MockClock) -> None:
    held: list[weakref.ref[memoryview]] = []

    class Forgetful(RunningSumService):
        async def open_session(self, peer_id: PeerId, request: OpenSession) -> RunningSumSession:
            assert request.tuning is not None
            assert request.tuning.prompts is not None
            assert isinstance(request.tuning.prompts.data, memoryview)
            held.append(weakref.ref(request.tuning.prompts.data))
            return await super().open_session(peer_id, replace(request, tuning=None))

    async with open_world(Forgetful()) as world:
        request = replace(open_request(), tuning=PROMPTS)
        async with world.client.open_session(world.peer_id, request, TIMEOUT_S) as session:
            gc.collect()
            assert held[0]() is None
            assert world.server.statistics().received_bytes == 0
            assert await session.step(Step(0, 0, wire_rows([[1]])), TIMEOUT_S) == StepReply(0, 1, wire_rows([[1]]))


PACKED = ["tuning", "float32", [8], "none", 32]


def backward_header(**fields: object) -> bytes:
    header = {"type": "backward", "version": 4, "model_id": SUM_MODEL, "span": [0, 4], **fields}
    return b"".join(encode_frame(header, [bytes(56)]))


@pytest.mark.parametrize(
    ("tensors", "tuning", "complaint"),
    [
        (
            [["hidden_states", "float32", [1, 14, 1], "none", 56]],
            None,
            "wanted a tensor grad_outputs, got hidden_states",
        ),
        ([["grad_outputs", "float32", [1, 14, 1], "none", 56]], None, "wanted a tensor hidden_states"),
        (
            [["hidden_states", "float32", [1, 7, 1], "none", 28], ["grad_outputs", "float32", [7, 1, 1], "none", 28]],
            None,
            "grad_outputs are float32 of shape [1, 7, 1]",
        ),
        (
            [
                ["hidden_states", "float32", [1, 3, 1], "none", 12],
                ["grad_outputs", "float32", [1, 3, 1], "none", 12],
                PACKED,
            ],
            None,
            "tuning of backward",
        ),
        (
            [
                ["hidden_states", "float32", [1, 3, 1], "none", 12],
                ["grad_outputs", "float32", [1, 3, 1], "none", 12],
                PACKED,
            ],
            {"prompts": [4, 1, 2]},
            "prompts have the hidden size of the inputs, 1, got 2",
        ),
        (
            [
                ["hidden_states", "float32", [1, 3, 1], "none", 12],
                ["grad_outputs", "float32", [1, 3, 1], "none", 12],
                PACKED,
            ],
            {"layers": [[0, "a b", 1, 4, 4]]},
            "such as self_attn.q_proj, got 'a b'",
        ),
    ],
)
async def test_a_malformed_backward_is_answered_and_the_stream_goes_on(
    tensors: list[object], tuning: object, complaint: str, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        stream = await world.open_raw()
        framed = FramedStream(stream)
        await stream.write(backward_header(tensors=tensors, tuning=tuning))
        answer = await world.hear(framed)
        assert isinstance(answer, ErrorReply)
        assert answer.code is ErrorCode.BAD_REQUEST
        assert complaint in answer.message
        await framed.send(BACKWARD)
        assert await world.hear(framed) == BackwardReply(wire_rows([[3, 2, 1], [2, 2, 2]]))


async def test_a_backward_within_a_session_is_refused_and_the_session_goes_on(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        framed = await world.open_framed()
        await framed.send(open_request())
        assert isinstance(await world.hear(framed), SessionOpened)
        await framed.send(BACKWARD)
        assert await world.hear(framed) == ErrorReply(ErrorCode.BAD_REQUEST, "a session takes steps, not Backward")
        await framed.send(Step(0, 0, wire_rows([[7]])))
        assert await world.hear(framed) == StepReply(0, 1, wire_rows([[7]]))
