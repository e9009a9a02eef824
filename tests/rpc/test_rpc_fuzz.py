"""Any sequence of messages, garbage and broken streams leaves the server as it was, and a session beside it exact."""

import itertools
import random
from collections.abc import Callable
from functools import partial

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from p2pswarm.core.errors import ConnectionLost, NetworkError, RemoteError, RequestRefused
from p2pswarm.core.ids import SessionId
from p2pswarm.net.network import Stream
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.testing.message_strategies import messages, tunings
from p2pswarm.testing.rpc_world import World, open_world, step
from p2pswarm.testing.running_sum_service import SUM_MODEL, SUM_SPAN, RunningSumService, wire_rows
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import (
    Backward,
    ErrorCode,
    ErrorReply,
    Forward,
    InfoRequest,
    Message,
    OpenSession,
    Push,
    PushedStep,
    Step,
)
from p2pswarm.wire.serialization import encode_message

Attacks = list[tuple[list[tuple[bytes, float]], str]]
"""For each stream: pieces to send, each with the wait after it, and how it ends."""

rows = st.lists(st.lists(st.integers(-5, 5), min_size=2, max_size=2), min_size=1, max_size=2).map(wire_rows)
brought_along = tunings(SUM_SPAN, 1)
plausible = st.one_of(
    st.builds(InfoRequest),
    st.builds(Forward, st.just(SUM_MODEL), st.just(SUM_SPAN), rows, tuning=st.none() | brought_along),
    rows.flatmap(
        lambda batch: st.builds(
            Backward,
            st.just(SUM_MODEL),
            st.just(SUM_SPAN),
            st.just(batch),
            rows.filter(lambda gradients: gradients.shape == batch.shape),
            tuning=st.none() | brought_along,
        )
    ),
    st.builds(
        OpenSession,
        st.just(SessionId("s")),
        st.just(SUM_MODEL),
        st.just(SUM_SPAN),
        st.integers(1, 20),
        st.integers(1, 2),
        tuning=st.none() | brought_along,
    ),
    st.builds(Step, st.integers(0, 5), st.integers(0, 6), rows),
    st.builds(PushedStep, st.integers(0, 5), st.integers(0, 6), st.just(2)),
    st.builds(Push, st.just(SessionId("s")), st.integers(0, 5), rows),
)


def whole(message: Message) -> bytes:
    return b"".join(encode_message(message))


def cut_short(message: Message, fraction: float) -> bytes:
    data = whole(message)
    return data[: int(len(data) * fraction)]


def with_flipped_byte(message: Message, fraction: float, mask: int) -> bytes:
    data = bytearray(whole(message))
    data[int((len(data) - 1) * fraction)] ^= mask
    return bytes(data)


fractions = st.floats(0, 1)
pieces = st.one_of(
    plausible.map(whole),
    plausible.map(whole),
    plausible.map(whole),
    messages().map(whole),
    st.builds(cut_short, plausible, fractions),
    st.builds(with_flipped_byte, plausible, fractions, st.integers(1, 255)),
    st.binary(max_size=100),
)
endings = st.sampled_from(["close", "reset", "leave"])
waits = st.sampled_from([0.0, 0.0, 0.03, 1.0])
opening = OpenSession(SessionId("s"), SUM_MODEL, SUM_SPAN, max_length=20, batch_size=1)


@st.composite
def sessions(draw: st.DrawFn) -> list[tuple[bytes, float]]:
    """A session that opens well, takes steps on, and goes wrong now and then."""
    sent = [(whole(opening), draw(waits))]
    position = 0
    for step_id in range(draw(st.integers(1, 8))):
        row = [1.0] * draw(st.integers(0, 3))
        step = Step(step_id, position, wire_rows([row]))
        pushed = PushedStep(step_id, position, len(row))
        sent += [(whole(message), draw(waits)) for message in draw(st.sampled_from([[step], [pushed], [pushed, step]]))]
        position = draw(st.integers(0, position + len(row)))
        sent += draw(st.lists(st.tuples(pieces, waits), max_size=1))
    return sent


streams = st.lists(st.tuples(pieces, waits), max_size=8) | sessions()
attacks = st.lists(st.tuples(streams, endings), min_size=1, max_size=4)


async def attack(stream: Stream, sent: list[tuple[bytes, float]], ending: str) -> list[Message]:
    """Plays one stream's part; what the server answered."""
    heard: list[Message] = []

    async def listen() -> None:
        framed = FramedStream(stream)
        try:
            while (message := await framed.receive()) is not None:
                heard.append(message)
        except ConnectionLost:
            return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        try:
            for data, wait_s in sent:
                await stream.write(data)
                await trio.sleep(wait_s)
            if ending == "close":
                await stream.close_write()
        except ConnectionLost:
            return heard
        if ending == "reset":
            stream.reset()
    return heard


async def neighbour(world: World, *, task_status: trio.TaskStatus[None]) -> None:
    async with world.open_session("neighbour", max_length=10_000, other=True) as session:
        task_status.started()
        for index in itertools.count():
            assert await step(session, index, index, [1]) == [index + 1]
            await trio.sleep(0.2)


async def survive(attacks: Attacks, delay_s: float) -> None:
    limits = RpcLimits(idle_session_timeout_s=20, idle_stream_timeout_s=20, call_timeout_s=5, push_wait_s=2)
    answers: list[Message] = []

    async def play(world: World, sent: list[tuple[bytes, float]], ending: str) -> None:
        answers.extend(await attack(await world.open_raw(), sent, ending))

    async with open_world(RunningSumService(max_length=10_000, delay_s=delay_s), limits) as world:
        async with trio.open_nursery() as background:
            await background.start(neighbour, world)
            async with trio.open_nursery() as nursery:
                for sent, ending in attacks:
                    nursery.start_soon(play, world, sent, ending)
            await trio.sleep(30)
            statistics = world.server.statistics()
            assert (statistics.num_peers, statistics.num_streams, statistics.num_sessions) == (1, 1, 1)
            assert world.service.num_opened - world.service.num_closed == 1
            assert statistics.received_bytes < 1000
            background.cancel_scope.cancel()
        await world.until_quiet()
    assert not [answer for answer in answers if isinstance(answer, ErrorReply) and answer.code is ErrorCode.INTERNAL]


def run_simulated(main: Callable[[], object]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


@given(attacks, st.sampled_from([0.0, 0.5]))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_nothing_that_strangers_send_harms_or_stays(attacks: Attacks, delay_s: float) -> None:
    run_simulated(partial(survive, attacks, delay_s))


@pytest.mark.exhaustive
@pytest.mark.slow
@given(attacks, st.sampled_from([0.0, 0.5]))
@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
def test_nothing_that_many_strangers_send_harms_or_stays(attacks: Attacks, delay_s: float) -> None:
    run_simulated(partial(survive, attacks, delay_s))


async def ask_a_liar(answer: bytes, backward: bool) -> None:
    async with open_world() as world:

        async def lie(stream: Stream) -> None:
            await stream.read()
            await stream.write(answer)
            await stream.close_write()

        world.serve_instead(lie)
        try:
            batch = wire_rows([[1, 2]])
            if backward:
                await world.client.backward(world.peer_id, Backward(SUM_MODEL, SUM_SPAN, batch, batch), 10.0)
            else:
                await world.client.forward(world.peer_id, Forward(SUM_MODEL, SUM_SPAN, batch), 10.0)
        except (RemoteError, NetworkError, RequestRefused) as error:
            assert error.peer_id == world.peer_id  # noqa: PT017 - an answer may also happen to be right


@given(
    messages().map(whole) | st.binary(max_size=100) | st.builds(with_flipped_byte, messages(), fractions, st.just(1)),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_nothing_that_a_server_answers_harms_a_client(answer: bytes, backward: bool) -> None:
    run_simulated(partial(ask_a_liar, answer, backward))


@pytest.mark.parametrize("seed", range(3))
def test_sixty_streams_of_random_bytes_leave_no_trace(seed: int) -> None:
    randomness = random.Random(seed)
    sent = [([(randomness.randbytes(randomness.randrange(200_000)), 1.0)], "reset") for _ in range(60)]
    run_simulated(partial(survive, sent, 0.0))
