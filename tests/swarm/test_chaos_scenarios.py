"""What a session survives, one misfortune at a time, in simulated time; what it does not, it tells clearly."""

import gc
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import torch
import trio
from chaos_swarm import NUM_BLOCKS, ChaosSwarm, Server, arithmetic_model, open_chaos_swarm
from chaos_user import ArithmeticTruth, User
from trio.testing import MockClock

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.session import Session
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import MissingBlocksError, RequestRefused
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import BanReason
from p2pswarm.routing.route import short_peer
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.testing.faulty_service import Fault
from p2pswarm.testing.memory_network import Link

FIRST, MIDDLE, LAST = SPANS = Span(0, 3), Span(3, 6), Span(6, 8)
CONFIG = ClientConfig(known_peers_path=None, recovery_timeout_s=60.0, min_step_timeout_s=3.0)
HANG_S = CONFIG.min_step_timeout_s + CONFIG.ping_timeout_s + 1.0
"""A server that is late is asked whether it is alive; the rest is for the replay."""
PROMPT_TOKENS = 10
MAX_LENGTH = 60
COMPUTE_S = 0.5
"""Where a test must catch a server at work."""


@dataclass
class World:
    swarm: ChaosSwarm
    session: Session
    user: User

    def serving(self, span: Span) -> Server:
        """Who has the session's blocks of this span."""
        (server,) = (server for server in self.in_use if server.span == span)
        return server

    def others(self, span: Span) -> list[Server]:
        """Living servers of the span that the session does not use."""
        of_span = [server for server in self.swarm.servers.values() if server.span == span]
        return [server for server in of_span if server not in self.in_use]

    @property
    def in_use(self) -> list[Server]:
        return self.swarm.serving(self.session)

    def tokens_run(self) -> dict[Server, int]:
        """By each living server, since it started."""
        return {server: server.service.service.num_tokens_run for server in self.swarm.servers.values()}

    @property
    def route(self) -> list[str]:
        return [hop.peer_id for hop in self.session.route.hops]

    def banned(self) -> dict[str, BanReason]:
        return {peer_id: ban.reason for peer_id, ban in self.swarm.planner.banned(trio.current_time()).items()}

    async def until_busy(self, server: Server) -> None:
        """Waits until the server computes for somebody."""
        with trio.fail_after(60):
            while not server.rpc.statistics().num_busy:  # noqa: ASYNC110
                await trio.sleep(0.01)


@asynccontextmanager
async def open_world(
    num_replicas: int = 2, *, delay_s: float = 0.0, prompt: int = PROMPT_TOKENS
) -> AsyncIterator[World]:
    """A session that has run its prompt, over three spans with so many servers each; all of it is looked after."""
    model = arithmetic_model(delay_s=delay_s)
    async with open_chaos_swarm(SPANS * num_replicas, model, CONFIG) as swarm:
        async with swarm.session(MAX_LENGTH) as session:
            user = User(session, ArithmeticTruth(NUM_BLOCKS), random.Random(1))
            if prompt:
                await user.say(prompt)
            yield World(swarm, session, user)
        swarm.memory.heal()
        await swarm.until_quiet()


async def took_s(action: Awaitable[None]) -> float:
    began_s = trio.current_time()
    await action
    return trio.current_time() - began_s


async def test_one_lost_server_is_replaced_and_only_its_blocks_are_run_again(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        await world.user.say()
        route, lost, (stand_in,) = world.route, world.serving(MIDDLE), world.others(MIDDLE)
        before = world.tokens_run()
        world.swarm.kill(lost)
        assert await took_s(world.user.say()) < 1.0
        assert world.route == [route[0], stand_in.peer_id, route[2]]
        assert world.session.num_recoveries == 1
        run = {server: count - before[server] for server, count in world.tokens_run().items() if server in world.in_use}
        assert run == {world.serving(FIRST): 1, stand_in: PROMPT_TOKENS + 2, world.serving(LAST): 1}


async def test_two_servers_of_one_chain_die_in_one_step(autojump_clock: MockClock) -> None:
    async with open_world(delay_s=COMPUTE_S) as world, trio.open_nursery() as nursery:
        nursery.start_soon(world.user.say)
        await world.until_busy(world.serving(MIDDLE))
        world.swarm.kill(world.serving(MIDDLE))
        world.swarm.kill(world.serving(LAST))
    assert world.user.num_steps == 2


async def test_all_servers_of_a_chain_die_in_one_step(autojump_clock: MockClock) -> None:
    async with open_world(delay_s=COMPUTE_S) as world, trio.open_nursery() as nursery:
        nursery.start_soon(world.user.say)
        await world.until_busy(world.serving(MIDDLE))
        for span in SPANS:
            world.swarm.kill(world.serving(span))
    assert world.user.num_steps == 2


async def test_a_stand_in_dies_while_it_is_told_the_history(autojump_clock: MockClock) -> None:
    async with open_world(num_replicas=3, delay_s=COMPUTE_S) as world:
        async with trio.open_nursery() as nursery:
            world.swarm.kill(world.serving(MIDDLE))
            stand_ins = world.others(MIDDLE)
            nursery.start_soon(world.user.say)
            with trio.fail_after(60):
                while not any(server.rpc.statistics().num_busy for server in stand_ins):  # noqa: ASYNC110
                    await trio.sleep(0.01)
            (stand_in,) = (server for server in stand_ins if server.rpc.statistics().num_busy)
            world.swarm.kill(stand_in)
        assert world.serving(MIDDLE) in stand_ins
        assert world.user.num_steps == 2


async def test_all_replicas_die_and_come_back_after_ten_seconds(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        for server in (world.serving(MIDDLE), *world.others(MIDDLE)):
            world.swarm.kill(server)

        async def come_back() -> None:
            await trio.sleep(10)
            await world.swarm.start(MIDDLE)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come_back)
            assert 10 < await took_s(world.user.say()) < 16
        await world.user.use(20)


async def test_the_same_servers_may_come_back_although_they_failed_before(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        lost = [world.serving(MIDDLE), *world.others(MIDDLE)]
        for server in lost:
            world.swarm.kill(server)

        async def come_back() -> None:
            await trio.sleep(10)
            for server in lost:
                await world.swarm.start(MIDDLE, server.number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come_back)
            assert await took_s(world.user.say()) < 40
        await world.user.use(20)


async def test_blocks_dead_for_good_are_told_in_time_and_the_session_goes_on_when_somebody_serves_them(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        dead = [world.serving(MIDDLE), *world.others(MIDDLE)]
        for server in dead:
            world.swarm.kill(server)
        began_s = trio.current_time()
        with pytest.raises(MissingBlocksError, match="blocks 3:6") as error:
            await world.user.say()
        assert CONFIG.recovery_timeout_s - 5 < trio.current_time() - began_s < CONFIG.recovery_timeout_s + 15
        assert error.value.missing == ((3, 6),)
        for server in dead:
            assert short_peer(server.peer_id) in str(error.value)
        assert world.session.position == PROMPT_TOKENS
        await world.swarm.start(MIDDLE)
        await world.user.use(20)


@pytest.mark.parametrize(
    "fault", [Fault.NOT_FINITE, Fault.WRONG_SHAPE, Fault.WRONG_POSITION, Fault.OTHER_STEP, Fault.FAILS]
)
@pytest.mark.parametrize("span", SPANS)
async def test_a_liar_is_banned_after_its_first_answer(fault: Fault, span: Span, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        liar = world.serving(span)
        liar.service.fault = fault
        assert await took_s(world.user.say()) < 2.0  # what it handed on is not trusted either
        assert world.banned() == {liar.peer_id: BanReason.MISBEHAVED}
        await world.user.use(3)
        assert liar.service.num_faults_shown == 1
        assert liar.peer_id not in world.route


@pytest.mark.parametrize("span", SPANS)
async def test_a_server_that_talks_garbage_is_banned_after_its_first_answer(
    span: Span, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        liar = world.serving(span)
        liar.garbler.is_on = True
        assert await took_s(world.user.say()) < 2.0
        assert world.banned() == {liar.peer_id: BanReason.MISBEHAVED}
        await world.user.use(3)
        assert liar.peer_id not in world.route


async def test_a_stand_in_that_was_lost_before_and_is_back_is_found_at_once(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        lost = world.serving(MIDDLE)
        world.swarm.kill(lost)
        await world.user.say()
        await world.swarm.start(MIDDLE, lost.number)
        world.swarm.memory.hang(world.serving(MIDDLE).peer_id)
        assert await took_s(world.user.say()) < HANG_S + 0.5  # the hung one is banned too, but not waited for
        world.swarm.memory.resume(next(iter(world.banned())))


async def test_a_server_that_misbehaved_is_taken_back_when_there_is_no_other(autojump_clock: MockClock) -> None:
    async with open_world(num_replicas=1) as world, trio.open_nursery() as nursery:
        only = world.serving(MIDDLE)
        only.service.fault = Fault.NOT_FINITE

        async def mend() -> None:
            await trio.sleep(2.0)
            only.service.fault = None

        nursery.start_soon(mend)
        assert await took_s(world.user.say()) < 8.0  # of a ban of 15 s
        assert only.service.num_faults_shown == 1


async def test_a_liar_without_a_replacement_is_asked_a_few_times_and_no_more(autojump_clock: MockClock) -> None:
    async with open_world(num_replicas=1) as world:
        only = world.serving(MIDDLE)
        only.service.fault = Fault.NOT_FINITE
        with pytest.raises(MissingBlocksError, match=r"blocks 3:6 .* not finite"):
            await world.user.say()
        assert only.service.num_faults_shown <= 4
        only.service.fault = None
        await world.user.use(5)


@pytest.mark.parametrize("span", SPANS)
async def test_a_server_that_hangs_costs_its_step_deadline_and_a_ping(span: Span, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        await world.user.use(5)
        hung = world.serving(span)
        world.swarm.memory.hang(hung.peer_id)
        assert 3.0 <= await took_s(world.user.say()) < HANG_S
        assert world.banned() == {hung.peer_id: BanReason.UNREACHABLE}
        world.swarm.memory.resume(hung.peer_id)
        await world.user.use(5)


async def test_stand_ins_that_hang_as_well_cost_four_seconds_each_until_a_newcomer_is_found(
    autojump_clock: MockClock,
) -> None:
    async with open_world(num_replicas=3) as world:
        hung = [world.serving(MIDDLE), *world.others(MIDDLE)]
        for server in hung:
            world.swarm.memory.hang(server.peer_id)
        newcomer = await world.swarm.start(MIDDLE)
        assert await took_s(world.user.say()) < HANG_S + 2 * 4.0 + 0.5
        assert world.serving(MIDDLE) is newcomer
        assert world.banned() == dict.fromkeys([server.peer_id for server in hung], BanReason.UNREACHABLE)
        for server in hung:
            world.swarm.memory.resume(server.peer_id)


@pytest.mark.parametrize("span", SPANS)
async def test_a_server_that_is_cut_off_is_replaced(span: Span, autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.swarm.cut_off([world.serving(span)])
        assert await took_s(world.user.say()) < HANG_S
        await world.user.use(5)


async def test_servers_that_cannot_reach_each_other_are_no_trouble(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        route = world.route
        for one, other in itertools.pairwise(route):
            world.swarm.memory.set_link(one, other, Link(latency_s=1000.0))
        await world.user.use(20)
        assert world.banned() == {}


async def test_a_mistake_of_the_clients_own_bans_nobody(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        wrong = StepInput(torch.ones(1, 1, 1), PROMPT_TOKENS, position_ids=torch.tensor([[-1]]))
        with pytest.raises(RequestRefused, match=r"blocks 0:3 at .* position ids are 0 or more"):
            await world.session.step(wrong)
        assert world.banned() == {}
        assert world.session.position == PROMPT_TOKENS
        await world.user.use(5)


@pytest.mark.parametrize("span", SPANS)
async def test_a_server_that_alone_refuses_a_step_is_gone_round_without_a_ban(
    span: Span, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        world.serving(span).service.fault = Fault.REFUSES
        await world.user.use(5)
        assert world.banned() == {}


async def test_an_overloaded_server_is_gone_round_without_a_ban(autojump_clock: MockClock) -> None:
    async with open_world(prompt=0) as world:
        busy = [server for server in world.swarm.servers.values() if server.span == MIDDLE]
        for server in busy:
            server.service.fault = Fault.IS_BUSY
        free = await world.swarm.start(MIDDLE)
        await world.swarm.view.refresh()
        await world.user.say(PROMPT_TOKENS)
        assert world.serving(MIDDLE) is free
        assert world.banned() == {}


async def test_a_server_that_becomes_overloaded_is_left_without_a_ban(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        busy = world.serving(MIDDLE)
        busy.service.fault = Fault.IS_BUSY
        assert await took_s(world.user.say()) < 1.0
        assert world.serving(MIDDLE) is not busy
        assert world.banned() == {}


@pytest.mark.parametrize("grace_s", [0.0, 30.0])
async def test_a_server_that_drains_hands_its_session_over(grace_s: float, autojump_clock: MockClock) -> None:
    async with open_world() as world, trio.open_nursery() as nursery:
        leaving = world.serving(MIDDLE)
        nursery.start_soon(world.swarm.drain, leaving, grace_s)
        await world.user.use(40)
        assert leaving.peer_id not in world.route
        assert world.banned() == {}
        assert leaving.holds_nothing()


async def after_going_back(world: World) -> None:
    world.user.go_back(4)


async def after_reordered_beams(world: World) -> None:
    world.user.go_back(0)
    await world.user.make(StepInput(tokens(3, 5), 0))
    await world.user.make(StepInput(tokens(3, 1), 5, beam_indices=torch.tensor([2, 0, 0])))


async def after_padding(world: World) -> None:
    world.user.go_back(0)
    mask = torch.tensor([[False, False, True], [True, True, True]])
    await world.user.make(StepInput(tokens(2, 3), 0, mask, (mask.cumsum(1) - 1).clamp(min=0)))


async def after_a_step_without_tokens(world: World) -> None:
    await world.user.make(StepInput(tokens(1, 0), 3))


async def before_anything(world: World) -> None:
    world.user.go_back(0)


def tokens(batch_size: int, num_tokens: int) -> torch.Tensor:
    return torch.arange(batch_size * num_tokens, dtype=torch.float32).view(batch_size, num_tokens, 1)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(
    "prepare", [after_going_back, after_reordered_beams, after_padding, after_a_step_without_tokens, before_anything]
)
async def test_a_server_is_lost(
    prepare: Callable[[World], Awaitable[None]], span: Span, autojump_clock: MockClock
) -> None:
    async with open_world() as world:
        await prepare(world)
        world.swarm.kill(world.serving(span))
        await world.user.say(2)
        await world.user.use(5)


async def test_beams_are_reordered_in_the_very_step_in_which_a_server_is_lost(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.user.go_back(0)
        await world.user.make(StepInput(tokens(3, 5), 0))
        world.swarm.kill(world.serving(MIDDLE))
        await world.user.make(StepInput(tokens(3, 1), 4, beam_indices=torch.tensor([2, 0, 0])))
        await world.user.make(StepInput(tokens(3, 1), 5, beam_indices=torch.tensor([1, 1, 0])))


async def test_two_hundred_sessions_opened_broken_and_resumed_leave_nothing_behind(autojump_clock: MockClock) -> None:
    async with open_chaos_swarm(SPANS * 2, config=CONFIG) as swarm:
        await use_a_session(swarm, 0)
        before = await what_is_held(swarm)
        for seed in range(200):
            await use_a_session(swarm, seed)
        assert await what_is_held(swarm) == before


async def use_a_session(swarm: ChaosSwarm, seed: int) -> None:
    """Opens, breaks, resumes and leaves a session; afterwards the swarm is as it was."""
    async with swarm.session(MAX_LENGTH) as session:
        user = User(session, ArithmeticTruth(NUM_BLOCKS), random.Random(seed))
        await user.say(PROMPT_TOKENS)
        victim = swarm.serving(session)[seed % 3]
        match seed % 4:
            case 0:
                await swarm.network.disconnect(victim.peer_id)
            case 1:
                swarm.memory.hang(victim.peer_id)
            case 2:
                victim.service.fault = Fault.NOT_FINITE
            case 3:
                swarm.kill(victim)
        await user.say()
        assert session.num_recoveries == 1
    if victim.peer_id in swarm.servers:
        victim.service.fault = None
        swarm.memory.resume(victim.peer_id)
    else:
        await swarm.start(victim.span, victim.number)
    await trio.sleep(1000)  # until bans are over and idle streams are closed


async def what_is_held(swarm: ChaosSwarm) -> dict[str, int]:
    """Everything that a session might leave behind."""
    await swarm.until_quiet()
    await trio.sleep(1000)
    gc.collect()
    statistics = [server.rpc.statistics() for server in swarm.servers.values()]
    services = [server.service.service for server in [*swarm.servers.values(), *swarm.ended]]
    return {
        "tasks": trio.lowlevel.current_statistics().tasks_living,
        "streams at servers": sum(each.num_streams for each in statistics),
        "sessions at servers": sum(each.num_sessions for each in statistics),
        "caches": sum(service.num_opened - service.num_closed for service in services),
        "ends of sessions": sum(type(thing) is RemoteSession for thing in gc.get_objects()),
        "sessions": sum(type(thing) is Session for thing in gc.get_objects()),
    }
