"""One part at a time on the device: what waits runs together, what fails fails alone, and a rest is used."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import outcome
import pytest
import trio
from timed_device import TimedDevice
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pswarm.core.errors import ServerBusy, SessionLost
from p2pswarm.core.ids import PeerId
from swarmd.device_thread import open_device_thread
from swarmd.scheduling.costs import CostModel
from swarmd.scheduling.dispatcher import Dispatcher, Job
from swarmd.scheduling.scheduler import Scheduler
from swarmd.scheduling.work import Kind, Part, Work

WORK_S = 0.1


@dataclass
class World:
    device: TimedDevice
    dispatcher: Dispatcher
    ran: list[list[str]] = field(default_factory=list)
    """The names of the jobs in each part."""
    prepared: list[str] = field(default_factory=list)


class NamedJob:
    """A job that only takes note."""

    def __init__(self, world: World, name: str, kind: Kind = Kind.DECODE, tokens: int = 1) -> None:
        self.world = world
        self.name = name
        self.work = Work(kind, PeerId("peer"), 1, tokens, trio.current_time(), session=hash(name), batch_key="key")
        self.room_error: Exception | None = None
        self.run_error: Exception | None = None

    def make_room(self, part: Part) -> None:
        if self.room_error is not None:
            raise self.room_error

    def run(self, part: Part) -> str:
        self.world.ran.append([self.name])
        if self.run_error is not None:
            raise self.run_error
        return self.name

    def run_together(self, jobs: Sequence[Job]) -> Sequence[outcome.Outcome[str]]:
        named = [job for job in jobs if isinstance(job, NamedJob)]
        self.world.ran.append([job.name for job in named])
        return [outcome.Value(job.name) if job.run_error is None else outcome.Error(job.run_error) for job in named]

    def prepare_next(self) -> None:
        self.world.prepared.append(self.name)


@pytest.fixture
async def world(nursery: trio.Nursery) -> World:
    device = TimedDevice(nursery, WORK_S)
    return World(device, Dispatcher(device, Scheduler(CostModel(WORK_S, 0.0, WORK_S / 10))))


async def start(nursery: trio.Nursery, job: NamedJob, results: dict[str, object]) -> None:
    """Runs the job in a task of its own; what becomes of it is in `results`."""

    async def run() -> None:
        try:
            results[job.name] = await job.world.dispatcher.run(job)
        except (ValueError, RuntimeError, SessionLost) as error:
            results[job.name] = error

    nursery.start_soon(run)
    await wait_all_tasks_blocked()


async def test_what_came_while_the_device_was_busy_runs_as_one_batch(autojump_clock: MockClock, world: World) -> None:
    results: dict[str, object] = {}
    began_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for name in "abcd":
            await start(nursery, NamedJob(world, name), results)
    assert world.ran == [["a"], ["b", "c", "d"]]
    assert results == {name: name for name in "abcd"}
    assert trio.current_time() - began_s == pytest.approx(2 * WORK_S, abs=0.01)
    assert world.dispatcher.statistics().batch_sizes == {1: 1, 3: 1}


async def test_what_fails_fails_alone(autojump_clock: MockClock, world: World) -> None:
    results: dict[str, object] = {}
    async with trio.open_nursery() as nursery:
        for name in "abcde":
            job = NamedJob(world, name)
            job.run_error = ValueError("broken") if name == "c" else None
            job.room_error = SessionLost("no memory") if name == "d" else None
            await start(nursery, job, results)
    assert world.ran == [["a"], ["b", "c", "e"]]
    assert [results[name] for name in "abe"] == ["a", "b", "e"]
    assert isinstance(results["c"], ValueError)
    assert isinstance(results["d"], SessionLost)


async def test_a_batch_that_breaks_as_a_whole_fails_all_of_its_jobs_and_no_others(
    autojump_clock: MockClock, world: World
) -> None:
    results: dict[str, object] = {}

    def break_down(jobs: Sequence[Job]) -> Sequence[outcome.Outcome[str]]:
        raise RuntimeError("out of memory")

    async with trio.open_nursery() as nursery:
        for name in "abc":
            job = NamedJob(world, name)
            job.run_together = break_down  # type: ignore[method-assign]
            await start(nursery, job, results)
        await trio.sleep(WORK_S * 1.5)
        await start(nursery, NamedJob(world, "d"), results)
    assert [results[name] for name in "ad"] == ["a", "d"]
    assert [str(results[name]) for name in "bc"] == ["out of memory"] * 2


async def test_a_job_that_is_cancelled_while_it_waits_never_runs(autojump_clock: MockClock, world: World) -> None:
    results: dict[str, object] = {}
    async with trio.open_nursery() as nursery:
        await start(nursery, NamedJob(world, "first"), results)
        with trio.move_on_after(WORK_S / 2) as scope:
            await world.dispatcher.run(NamedJob(world, "cancelled"))
        assert scope.cancelled_caught
        await start(nursery, NamedJob(world, "last"), results)
    assert world.ran == [["first"], ["last"]]
    assert world.dispatcher.statistics().num_waiting == 0


async def test_a_prompt_that_is_cancelled_in_the_middle_does_not_go_on(autojump_clock: MockClock, world: World) -> None:
    with trio.move_on_after(WORK_S / 2) as scope:
        await world.dispatcher.run(NamedJob(world, "prompt", Kind.PREFILL, tokens=100))
    assert scope.cancelled_caught
    assert await world.dispatcher.run(NamedJob(world, "next")) == "next"
    assert world.ran == [["prompt"], ["next"]]


async def test_a_job_can_be_ended_by_another_that_needs_its_memory(autojump_clock: MockClock, world: World) -> None:
    results: dict[str, object] = {}
    async with trio.open_nursery() as nursery:
        await start(nursery, NamedJob(world, "running"), results)
        old, young = NamedJob(world, "old"), NamedJob(world, "young")

        def evict(part: Part) -> None:
            world.dispatcher.end(young.work, SessionLost("evicted"))

        old.make_room = evict  # type: ignore[method-assign]
        await start(nursery, young, results)
        await start(nursery, old, results)
    assert world.ran == [["running"], ["old"]]
    assert isinstance(results["young"], SessionLost)
    world.dispatcher.end(young.work, SessionLost("a second time does nothing"))


async def test_memory_changes_hands_only_while_the_device_is_idle(autojump_clock: MockClock, world: World) -> None:
    happened: list[str] = []
    world.dispatcher.when_idle(lambda: happened.append("idle"))
    assert happened == ["idle"]
    results: dict[str, object] = {}
    async with trio.open_nursery() as nursery:
        await start(nursery, NamedJob(world, "a"), results)
        world.dispatcher.when_idle(lambda: happened.append(f"after {len(world.ran)}"))
        await start(nursery, NamedJob(world, "b"), results)
        assert happened == ["idle"]
    assert happened == ["idle", "after 1"]


async def test_a_held_step_runs_though_nothing_else_happens(autojump_clock: MockClock, world: World) -> None:
    results: dict[str, object] = {}
    async with trio.open_nursery() as nursery:
        for name in "ab":
            await start(nursery, NamedJob(world, name), results)
        await trio.sleep(3 * WORK_S)
        began_s = trio.current_time()
        await start(nursery, NamedJob(world, "a"), results)
    assert world.ran[2:] == [["a"]]
    assert WORK_S < trio.current_time() - began_s <= 1.4 * WORK_S
    assert world.dispatcher.queue_delay_s > 0


async def test_a_held_step_runs_though_the_one_that_watched_the_time_is_gone(
    autojump_clock: MockClock, world: World
) -> None:
    results: dict[str, object] = {}
    async with trio.open_nursery() as nursery:
        for name in "abc":
            await start(nursery, NamedJob(world, name), results)
        await trio.sleep(3 * WORK_S)
        with trio.move_on_after(WORK_S / 20):
            await world.dispatcher.run(NamedJob(world, "a"))
        await start(nursery, NamedJob(world, "b"), results)
    assert world.ran[2:] == [["b"]]


async def test_the_next_step_is_prepared_when_the_device_rests_after_one_that_ran_alone(
    autojump_clock: MockClock, world: World
) -> None:
    results: dict[str, object] = {}
    async with trio.open_nursery() as nursery:
        for name in "abc":
            await start(nursery, NamedJob(world, name), results)
    await trio.sleep(1)
    assert world.prepared == []
    await world.dispatcher.run(NamedJob(world, "d"))
    await trio.sleep(1)
    assert world.prepared == ["d"]


async def test_a_full_queue_is_told_at_once(autojump_clock: MockClock, world: World) -> None:
    dispatcher = Dispatcher(world.device, Scheduler(CostModel(), max_waiting=0))
    with pytest.raises(ServerBusy):
        await dispatcher.run(NamedJob(world, "a"))
    assert world.ran == []


async def test_jobs_run_on_the_device_thread() -> None:
    async with open_device_thread() as device:
        world = World(None, Dispatcher(device, Scheduler(CostModel())))  # type: ignore[arg-type]
        results: dict[str, object] = {}
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for name in "abcdef":
                    await start(nursery, NamedJob(world, name), results)
                failing = NamedJob(world, "g")
                failing.run_error = ValueError("broken")
                await start(nursery, failing, results)
    assert [results[name] for name in "abcdef"] == list("abcdef")
    assert isinstance(results["g"], ValueError)
