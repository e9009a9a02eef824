"""Whatever crosses on the way, each step is run once, answered once, and nothing is left behind."""

import contextlib
import itertools
from dataclasses import dataclass, replace
from functools import partial

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from p2pswarm.core.errors import RequestRefused
from p2pswarm.core.ids import SessionId
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.testing.memory_network import Link
from p2pswarm.testing.rpc_world import TIMEOUT_S, ChainWorld, World, open_chain_world, open_request, open_world
from p2pswarm.testing.running_sum_service import RunningSumService, read_rows, wire_rows
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import Push, PushedStep, SessionOpened, Step, StepReply, WireTensor

TIMES = [0.0, 0.01, 0.025, 0.03, 0.2, 1.0]
"""Around the 25 ms that a message takes one way."""
NAN = wire_rows([[float("nan")]])
TOO_LONG = wire_rows([[1.0, 1.0]])


@dataclass(frozen=True)
class Plan:
    """What comes for one step, and when."""

    header_s: float
    copy_s: float | None
    """After the header."""
    push_s: float | None
    rogues: tuple[tuple[float, int, WireTensor], ...]
    """Pushes that are wrong: when, for the step how many ids away, and what."""


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """The hidden states come one way or the other; next to wrong pushes, which may displace the right one, by copy."""
    times = st.sampled_from(TIMES)
    push_s = draw(st.none() | times)
    rogue = st.tuples(times, st.sampled_from([-1, 0]), st.sampled_from([NAN, TOO_LONG]))
    rogues = tuple(draw(st.lists(rogue, max_size=2)))
    copy_s = draw(times if push_s is None or rogues else st.none() | times)
    return Plan(draw(times), copy_s, push_s, rogues)


async def push_at(world: World, time_s: float, step_id: int, hidden_states: WireTensor) -> None:
    await trio.sleep(time_s)
    with contextlib.suppress(RequestRefused):
        await world.other_client.push(world.peer_id, Push(SessionId("session"), step_id, hidden_states), TIMEOUT_S)


async def play(plan: Plan, world: World, framed: FramedStream, step_id: int, position: int) -> None:
    """The step of that plan, and its one answer."""
    token = wire_rows([[float(step_id + 1)]])
    async with trio.open_nursery() as nursery:
        if plan.push_s is not None:
            nursery.start_soon(push_at, world, plan.push_s, step_id, token)
        for time_s, offset, hidden_states in plan.rogues:
            nursery.start_soon(push_at, world, time_s, max(0, step_id + offset), hidden_states)
        await trio.sleep(plan.header_s)
        await framed.send(PushedStep(step_id, position, 1))
        if plan.copy_s is not None:
            await trio.sleep(plan.copy_s)
            await framed.send(Step(step_id, position, token))
        answer = await world.hear(framed)
        assert isinstance(answer, StepReply)
        total = sum(range(1, step_id + 2))
        assert replace(answer, from_push=False) == StepReply(step_id, position + 1, wire_rows([[float(total)]]))
        assert answer.from_push or plan.copy_s is not None
        assert not answer.from_push or plan.push_s is not None


async def play_all(steps: list[Plan], delay_s: float) -> None:
    async with open_world(RunningSumService(delay_s=delay_s)) as world:
        framed = await world.open_framed()
        await framed.send(open_request())
        assert await world.hear(framed) == SessionOpened(SessionId("session"))
        for step_id, plan in enumerate(steps):
            await play(plan, world, framed, step_id, step_id)
        await framed.close_write()
        assert await world.hear(framed) is None
        world.other_client.close()
        await world.until_quiet()


@given(st.lists(plans(), min_size=1, max_size=8), st.sampled_from([0.0, 0.02, 0.5]))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_each_step_has_one_right_answer_in_whatever_order_things_come(steps: list[Plan], delay_s: float) -> None:
    trio.run(partial(play_all, steps, delay_s), clock=MockClock(autojump_threshold=0))


NEAR, DEAD = Link(0.01), Link(1000.0)


async def step_over(world: ChainWorld, sessions: list[RemoteSession], step_id: int, patience_s: float) -> list[float]:
    """A pushed step over the chain; where a push does not come in time the client's copy goes instead."""
    hops = [server.hop(f"s{index}") for index, server in enumerate(world.servers)]
    announced = [PushedStep(step_id, step_id, 1, push_to=hop) for hop in [*hops[1:], None]]
    hidden_states = wire_rows([[1.0]])
    await sessions[0].send(announced[0].with_hidden_states(hidden_states))
    for session, step in itertools.islice(zip(sessions, announced, strict=True), 1, None):
        await session.send(step)
    for session, step in zip(sessions, announced, strict=True):
        reply = await session.reply_within(step, patience_s)
        if reply is None:
            if session is not sessions[0]:
                await session.send(step.with_hidden_states(hidden_states))
            reply = await session.receive(step, TIMEOUT_S)
        hidden_states = reply.hidden_states
    return read_rows(hidden_states)[0]


async def walk(cuts: list[tuple[bool, bool]], delay_s: float, patience_s: float) -> None:
    async with open_chain_world(3, link=NEAR, delay_s=delay_s) as world, contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(world.open_session(index, f"s{index}")) for index in range(3)]
        sums = [0.0] * 3
        for step_id, cut in enumerate(cuts):
            for (one, other), is_cut in zip(itertools.pairwise(world.servers), cut, strict=True):
                world.memory.set_link(one.peer_id, other.peer_id, DEAD if is_cut else NEAR)
            token = 1.0
            for index in range(3):
                sums[index] += token
                token = sums[index]
            assert await step_over(world, sessions, step_id, patience_s) == [token]
        await stack.aclose()
        await world.until_quiet()


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.02]),
    st.sampled_from([0.03, 0.05, 0.5]),
)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
def test_a_chain_whose_servers_lose_sight_of_one_another_stays_exact(
    cuts: list[tuple[bool, bool]], delay_s: float, patience_s: float
) -> None:
    trio.run(partial(walk, cuts, delay_s, patience_s), clock=MockClock(autojump_threshold=0))
