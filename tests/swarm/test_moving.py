"""Servers that move to where the swarm needs them, in simulated time: never for nothing, never leaving a gap, and never
ending as one that says it serves and does not."""

import math
import random
from collections.abc import Sequence

import pytest
import trio
from chaos_user import ArithmeticTruth, User
from moving_swarm import GRACE_S, LOADING_S, PERIOD_S, QUALITY, Event, MovingSwarm, open_moving_swarm
from trio.testing import MockClock

from p2pswarm.core.errors import CheckpointError, ServerBusy
from p2pswarm.core.ids import SessionId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.placement.rebalancing import Move, should_move
from p2pswarm.rpc.client import RpcClient
from p2pswarm.testing.arithmetic_model import ARITHMETIC_MODEL
from p2pswarm.wire.messages import OpenSession
from swarmd.balancing import Decide
from swarmd.watchdog import PERIOD_S as WATCH_PERIOD_S
from swarmd.watchdog import PROBE_TIMEOUT_S

NUM_BLOCKS = 30
HOUR_S = 3600.0
LEFT, RIGHT = Span(0, 4), Span(4, 8)


def wants(span: Span) -> Decide:
    """For a server that wants to be there, and nowhere else."""

    def decide(own: ServerInfo, others: object) -> Move | None:
        return None if own.span == span else Move(span, 2.0)

    return decide


class Eager:
    """For servers that want to be there whatever they see, once `is_on`, until they have told the others."""

    def __init__(self, span: Span) -> None:
        self.is_on = False
        self._wants = wants(span)

    def __call__(self, own: ServerInfo, others: Sequence[ServerInfo]) -> Move | None:
        if own.next_span is None:
            return self._wants(own, others) if self.is_on else None
        return should_move(own, others, QUALITY)


async def until_told(swarm: MovingSwarm, name: str, timeout_s: float = 10 * PERIOD_S) -> None:
    with trio.fail_after(timeout_s):
        while not swarm.named(name):  # noqa: ASYNC110
            await trio.sleep(0.05)


async def until_covered(swarm: MovingSwarm, timeout_s: float) -> None:
    with trio.fail_after(timeout_s):
        while min(swarm.num_holders()) == 0:  # noqa: ASYNC110
            await trio.sleep(0.5)


async def stay_covered(swarm: MovingSwarm, for_s: float) -> None:
    """Fails at the first moment at which nobody answers for some block."""
    with trio.move_on_after(for_s):
        while True:
            assert min(swarm.num_holders()) > 0
            await trio.sleep(0.5)


@pytest.mark.parametrize(
    "sizes",
    [[10] * 6, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ([10] * 3, [30, 30], [7, 9, 11, 13, 8, 12]))],
    ids=str,
)
async def test_a_swarm_that_is_covered_and_balanced_does_not_move_for_hours(
    sizes: list[int], autojump_clock: MockClock
) -> None:
    async with open_moving_swarm(NUM_BLOCKS, sizes) as swarm:
        await stay_covered(swarm, HOUR_S)
        assert swarm.named("moving", "not_listed") == []


@pytest.mark.parametrize("seed", range(5))
async def test_blocks_whose_servers_were_killed_are_covered_again_and_a_session_goes_on(
    seed: int, autojump_clock: MockClock
) -> None:
    async with open_moving_swarm(NUM_BLOCKS, [10] * 6, seed=seed) as swarm, swarm.session(400) as session:
        user = User(session, ArithmeticTruth(NUM_BLOCKS), random.Random(seed))
        await user.say(5)
        for server in [server for server in swarm.servers if server.span.covers(15)]:
            swarm.kill(server)
        assert min(swarm.num_holders()) == 0
        await until_covered(swarm, 3 * PERIOD_S)
        await user.say(5)
        await stay_covered(swarm, HOUR_S)
        assert len(swarm.named("moved")) == 1
        await user.say(5)


async def test_over_the_real_directory_too(autojump_clock: MockClock) -> None:
    async with open_moving_swarm(8, [4] * 4, with_dht=True) as swarm, swarm.session(100) as session:
        user = User(session, ArithmeticTruth(8), random.Random(1))
        await user.say(5)
        for server in [server for server in swarm.servers if server.span == RIGHT]:
            swarm.kill(server)
        await until_covered(swarm, 3 * PERIOD_S)
        await user.say(5)
        (moved,) = swarm.named("moved")
        assert moved.fields["from_blocks"] == "0:4"
        assert moved.fields["to_blocks"] == "4:8"


async def test_a_session_through_a_server_that_moves_goes_on_elsewhere(autojump_clock: MockClock) -> None:
    async with open_moving_swarm(8) as swarm:
        await swarm.start(4, decide=wants(RIGHT))  # it takes 0:4 for now
        await swarm.start(4)
        async with swarm.session(400) as session:
            user = User(session, ArithmeticTruth(8), random.Random(1))
            await user.say(5)
            await swarm.start(4)
            with trio.fail_after(10 * PERIOD_S):
                while not swarm.named("moved"):
                    await user.say()
                    await trio.sleep(0.8)
            assert session.num_recoveries == 1
            await user.say(20)
        mover = swarm.servers[0]
        assert mover.loader.loaded == [LEFT, RIGHT]
        assert mover.loader.services[0].num_closed == mover.loader.services[0].num_opened > 0


async def test_a_session_in_use_has_the_grace_period_to_end(autojump_clock: MockClock) -> None:
    async with open_moving_swarm(8) as swarm:
        mover = await swarm.start(4, decide=wants(RIGHT))
        await swarm.start(4)
        async with swarm.session(400) as session, trio.open_nursery() as nursery:
            user = User(session, ArithmeticTruth(8), random.Random(1))

            async def take_over() -> None:
                await until_told(swarm, "moving")
                await swarm.start(4)

            nursery.start_soon(take_over)
            while mover.info.state is not ServerState.JOINING:
                await user.say()
                await trio.sleep(0.5)
            (moving,) = swarm.named("moving")
            assert moving.fields["num_sessions"] == 1
            assert GRACE_S <= trio.current_time() - moving.at_s < GRACE_S + 2
            await user.say(5)


async def test_the_announcement_says_at_each_moment_what_is_so(autojump_clock: MockClock) -> None:
    async with open_moving_swarm(8) as swarm:
        mover = await swarm.start(4, decide=wants(RIGHT))
        await swarm.start(4)
        await swarm.start(4)
        assert swarm.board is not None
        seen: list[tuple[ServerState, str, str]] = []
        with trio.fail_after(10 * PERIOD_S):
            while not swarm.named("moved"):
                info = swarm.board.announced[mover.info.peer_id]
                if info.state is ServerState.ONLINE:
                    assert mover.loader.loaded[-1] == info.span
                now = (info.state, str(info.span), str(info.next_span))
                if not seen or seen[-1] != now:
                    seen.append(now)
                await trio.sleep(0.01)
        assert seen == [
            (ServerState.ONLINE, "0:4", "None"),
            (ServerState.ONLINE, "0:4", "4:8"),
            (ServerState.DRAINING, "0:4", "4:8"),
            (ServerState.JOINING, "4:8", "None"),
            (ServerState.ONLINE, "4:8", "None"),
        ]
        (moved,) = swarm.named("moved")
        assert moved.fields["gain"] == 2.0
        assert LOADING_S < moved.fields["took_s"] < LOADING_S + 3
        assert mover.life.statistics().num_moves == 1


async def test_a_client_with_an_old_picture_is_sent_elsewhere_not_told_that_it_is_wrong(
    autojump_clock: MockClock,
) -> None:
    async with open_moving_swarm(8) as swarm:
        mover = await swarm.start(4, decide=wants(RIGHT))
        other = await swarm.start(4)
        await swarm.start(4)
        rpc = RpcClient(other.node)
        await other.node.connect(mover.node.addresses[0])

        async def ask() -> None:
            async with rpc.open_session(
                mover.info.peer_id, OpenSession(SessionId("old"), ARITHMETIC_MODEL, LEFT, 8, 1), 10.0
            ):
                pass

        await ask()
        await until_told(swarm, "moving")
        await trio.sleep(1)
        with pytest.raises(ServerBusy, match="is about to stop or to move"):
            await ask()
        await until_told(swarm, "moved")
        with pytest.raises(ServerBusy, match=r"has moved to blocks 4:8, asked were 0:4"):
            await ask()
        rpc.close()


@pytest.mark.parametrize("seed", range(8))
async def test_of_two_that_want_to_leave_the_same_blocks_at_one_moment_one_stays(
    seed: int, autojump_clock: MockClock
) -> None:
    async with open_moving_swarm(8, seed=seed, period_s=0.2) as swarm:
        eager = Eager(RIGHT)
        for _ in range(4):
            await swarm.start(4, decide=eager)
        eager.is_on = True
        for server in [server for server in swarm.servers if server.span == RIGHT]:
            swarm.kill(server)
        with trio.move_on_after(60):
            while True:
                assert any(server.is_serving and server.span == LEFT for server in swarm.servers)
                await trio.sleep(0.05)
        assert len(swarm.named("moving")) == len(swarm.named("moved")) == 1


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), MemoryError(), CheckpointError("block 5 is damaged")]
)
async def test_a_server_that_cannot_load_what_it_moved_to_goes_back(
    failure: Exception, autojump_clock: MockClock
) -> None:
    async with open_moving_swarm(8) as swarm:
        mover = await swarm.start(4, decide=wants(RIGHT))
        await swarm.start(4)
        await swarm.start(4)
        mover.loader.failures[RIGHT] = failure
        await until_told(swarm, "move_failed")
        (failed,) = swarm.named("move_failed")
        assert failed.fields["message"] == (str(failure) or "MemoryError")
        with trio.fail_after(LOADING_S + 1):
            while not mover.is_serving:  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert mover.span == LEFT
        assert mover.failure is None
        del mover.loader.failures[RIGHT]
        await until_told(swarm, "moved", 20 * PERIOD_S)  # a later try goes well
        assert mover.span == RIGHT
        assert mover.life.statistics().num_failed_moves == 1


async def test_a_server_that_can_load_nothing_any_more_ends_and_says_why(autojump_clock: MockClock) -> None:
    async with open_moving_swarm(8) as swarm:
        mover = await swarm.start(4, decide=wants(RIGHT))
        mover.loader.failures |= {RIGHT: OSError("the disk is full"), LEFT: OSError("the disk is broken")}
        with trio.fail_after(10 * PERIOD_S):
            await mover.stopped.wait()
        assert str(mover.failure) == (
            "no blocks could be loaded after a move: first the disk is full; then blocks 0:4: the disk is broken"
        )
        await trio.sleep(1)
        assert swarm.board is not None
        assert swarm.board.announced == {}


async def test_a_server_that_fails_to_move_again_and_again_tries_more_and_more_rarely(
    autojump_clock: MockClock,
) -> None:
    async with open_moving_swarm(8) as swarm:
        mover = await swarm.start(4, decide=wants(RIGHT))
        mover.loader.failures[RIGHT] = OSError("the disk is full")
        await trio.sleep(100 * PERIOD_S)
        assert 4 <= len(swarm.named("move_failed")) <= 10
        assert mover.is_serving


@pytest.mark.parametrize("after_s", [0.0, 0.03, 1.0, GRACE_S + 1, GRACE_S + LOADING_S / 2])
async def test_a_stop_in_the_middle_of_a_move_works_at_once(after_s: float, autojump_clock: MockClock) -> None:
    async with open_moving_swarm(8) as swarm:
        mover = await swarm.start(4, decide=wants(RIGHT))
        await swarm.start(4)
        async with swarm.session(4000) as session:
            user = User(session, ArithmeticTruth(8), random.Random(1))
            while not swarm.named("moving"):
                await user.say()
                await trio.sleep(0.8)
            await trio.sleep(after_s)
            mover.stopped.set()
            await trio.sleep(0.1)
            assert mover not in swarm.servers


async def test_a_server_whose_device_hangs_ends_and_says_so(autojump_clock: MockClock) -> None:
    async with open_moving_swarm(8, [4, 4]) as swarm:
        hung = swarm.servers[0]
        hung.loader.is_stuck = True
        with trio.fail_after(WATCH_PERIOD_S + PROBE_TIMEOUT_S + 1):
            await hung.stopped.wait()
        assert "the device has not answered a single token for 300 s" in str(hung.failure)


async def test_a_server_whose_device_hangs_in_a_move_ends_too(autojump_clock: MockClock) -> None:
    async with open_moving_swarm(8) as swarm:
        mover = await swarm.start(4, decide=wants(RIGHT))
        await until_told(swarm, "moving")
        mover.loader.is_stuck = True
        with trio.fail_after(GRACE_S + PROBE_TIMEOUT_S + 1):
            await mover.stopped.wait()
        assert "did not give memory back in 300 s" in str(mover.failure)


async def test_a_server_that_nobody_finds_any_more_announces_itself_again(autojump_clock: MockClock) -> None:
    async with open_moving_swarm(8, [4, 4]) as swarm:
        lost = swarm.servers[0]
        assert swarm.board is not None
        await trio.sleep(2 * WATCH_PERIOD_S + 1)  # all has been measured, there is nothing new to announce
        del swarm.board.announced[lost.info.peer_id]
        await trio.sleep(WATCH_PERIOD_S + 1)
        assert swarm.board.announced[lost.info.peer_id] == lost.info
        assert [event.server for event in swarm.named("not_listed")] == [lost.number]


class Critic:
    """Watches a swarm at every half second, and fails at a move that leaves a gap or that helps nobody."""

    def __init__(self, swarm: MovingSwarm) -> None:
        self.killed_at_s = -math.inf
        self._swarm = swarm
        self._num_moved = 0
        self._was_covered = True

    async def watch(self) -> None:
        while True:
            self._look()
            await trio.sleep(0.5)

    def _look(self) -> None:
        moved = self._swarm.named("moved")
        for event in moved[self._num_moved :]:
            self._judge(event)
        self._num_moved = len(moved)
        is_covered = min(self._swarm.num_holders()) > 0
        since_kill_s = trio.current_time() - self.killed_at_s
        if not is_covered:
            assert not self._was_covered or since_kill_s < 1, "a gap came up although nobody was killed"
            assert since_kill_s < 3 * PERIOD_S, f"a gap for {since_kill_s:.0f} s"
        self._was_covered = is_covered

    def _judge(self, event: Event) -> None:
        """Without the move, as things are now, the blocks served worst would be served worse."""
        (mover,) = (server for server in self._swarm.servers if server.number == event.server)
        now = self._swarm.throughputs()
        had_it_stayed = list(now)
        for sign, blocks in (1, Span.parse(event.fields["from_blocks"])), (-1, mover.span):
            for block in range(blocks.start, blocks.end):
                had_it_stayed[block] += sign * mover.loader.throughput_tokens_per_s
        assert sorted(now) > sorted(had_it_stayed), f"{event} helped nobody"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_in_hours_of_coming_and_going_no_move_leaves_a_gap_or_helps_nobody(
    seed: int, autojump_clock: MockClock
) -> None:
    """Servers of all sizes and speeds come and are killed."""
    randomness = random.Random(seed)
    async with open_moving_swarm(NUM_BLOCKS, [10] * 9, seed=seed) as swarm, trio.open_nursery() as nursery:
        critic = Critic(swarm)
        nursery.start_soon(critic.watch)
        for _ in range(15):
            await trio.sleep(randomness.expovariate(1 / (5 * PERIOD_S)))
            if len(swarm.servers) > 4 and randomness.random() < 0.7:
                critic.killed_at_s = trio.current_time()
                swarm.kill(randomness.choice(swarm.servers))
            else:
                await swarm.start(randomness.randint(6, 14), randomness.choice([50.0, 100.0, 200.0]))
        await trio.sleep(10 * PERIOD_S)
        nursery.cancel_scope.cancel()
    assert 1 <= len(swarm.named("moved")) <= 15
