"""Carries the scheduler's decisions out: one part of the work at a time goes to the device, the rest waits.

While a part runs, the trio thread takes in what comes; as soon as it is back, the next one is picked and handed over,
before anybody is told of the results. So whatever waits at that moment runs together, and since memory changes hands
only between two parts (`Job.make_room`, `when_idle`), nothing needs a lock.

Knows nothing of torch, tensors or sessions; read `scheduler.py` for what is picked, `swarmd/span_session.py` for jobs.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import outcome
import trio

from p2pswarm.core.ids import PeerId
from swarmd.device_thread import Device
from swarmd.queue_delay import QueueDelay
from swarmd.scheduling.costs import CostModel
from swarmd.scheduling.scheduler import Scheduler
from swarmd.scheduling.work import Kind, Part, Work

Result = Any
"""Of a job; what it is is between the job and whoever waits for it."""


class Job(Protocol):
    """A request that takes one part or several on the device."""

    @property
    def work(self) -> Work: ...

    def make_room(self, part: Part) -> None:
        """In the trio thread, while the device is idle: takes the memory for the part. What it raises ends the job."""
        ...

    def run(self, part: Part) -> Result:
        """On the device: the part. What it returns for the last part is the result; what it raises ends the job."""
        ...

    def run_together(self, jobs: Sequence["Job"]) -> Sequence[outcome.Outcome[Result]]:
        """On the device: a batch of jobs with equal batch keys, this one first. One that fails must not fail others."""
        ...

    def prepare_next(self) -> None:
        """On the device, when it has rested for a moment after a part of this job that ran alone: what can be done for
        what follows. The only one of these functions that runs while memory may change hands."""
        ...


@dataclass(frozen=True, slots=True)
class DispatcherStatistics:
    """Since the start, but for what waits and decodes now."""

    num_waiting: int
    num_decoding: int
    """Sessions with a decode step within the last second."""
    queue_delay_s: float
    num_parts: Mapping[Kind, int]
    num_tokens: Mapping[Kind, int]
    """Over all rows."""
    busy_s: Mapping[Kind, float]
    batch_sizes: Mapping[int, int]
    """How often so many rows were decoded together."""
    served_s: Mapping[PeerId, float]
    """What each peer has had of the device's time lately."""


class Dispatcher:
    """Used by tasks of one trio loop; it needs none of its own."""

    def __init__(self, device: Device, scheduler: Scheduler) -> None:
        self._device = device
        self._scheduler = scheduler
        self._waiting: dict[Work, _Waiting] = {}
        self._is_busy = False
        self._when_idle: list[Callable[[], None]] = []
        self._queue_delay = QueueDelay(trio.current_time())
        self._num_parts: Counter[Kind] = Counter()
        self._num_tokens: Counter[Kind] = Counter()
        self._busy_s: dict[Kind, float] = dict.fromkeys(Kind, 0.0)
        self._batch_sizes: Counter[int] = Counter()

    @property
    def costs(self) -> CostModel:
        """What is known of the device's speed."""
        return self._scheduler.costs

    @property
    def queue_delay_s(self) -> float:
        """How long decode steps wait these days before they run."""
        return self._queue_delay.at(trio.current_time())

    async def run(self, job: Job) -> Result:
        """The job's result. Raises what it raises, and `ServerBusy` when too much waits already.

        Cancelled, the part that runs runs to its end, and no other follows.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._scheduler.add(job.work)
        waiting = self._waiting[job.work] = _Waiting(job)
        try:
            self._hand_over()
            while waiting.result is None:
                await waiting.until_woken()
                if waiting.result is None:
                    waiting.scope = trio.CancelScope()
                    self._hand_over()
            return waiting.result.unwrap()
        finally:
            if waiting.result is None:
                self._end(waiting, outcome.Error(trio.BrokenResourceError("nobody waits")))
                self._hand_over()  # it may have been the one to wake us

    def end(self, work: Work, error: Exception) -> None:
        """Fails the job that waits with this work, if any. Not for one that the device runs just now."""
        waiting = self._waiting.get(work)
        if waiting is not None:
            self._end(waiting, outcome.Error(error))

    def forget_session(self, session: int) -> None:
        """It is over, and nobody is to wait on its account."""
        self._scheduler.forget_session(session)

    def when_idle(self, function: Callable[[], None]) -> None:
        """Calls the function once the device runs nothing: at once, or before the next part is handed over."""
        if self._is_busy:
            self._when_idle.append(function)
        else:
            function()

    def statistics(self) -> DispatcherStatistics:
        now_s = trio.current_time()
        scheduler = self._scheduler.statistics(now_s)
        return DispatcherStatistics(
            num_waiting=scheduler.num_waiting,
            num_decoding=scheduler.num_decoding,
            queue_delay_s=self.queue_delay_s,
            num_parts=dict(self._num_parts),
            num_tokens=dict(self._num_tokens),
            busy_s=dict(self._busy_s),
            batch_sizes=dict(self._batch_sizes),
            served_s=self._scheduler.service.by_peer(now_s),
        )

    def _hand_over(self) -> None:
        """Gives the device what is to run next, if it is free and something may."""
        while self._waiting and not self._is_busy:
            now_s = trio.current_time()
            part = self._scheduler.next(now_s)
            if part is None:
                self._set_alarm()
                return
            ready = self._with_room(part)
            if ready:
                part = part.of([waiting.job.work for waiting in ready])
                self._note_start(part, now_s)
                jobs = [waiting.job for waiting in ready]
                self._is_busy = True
                self._device.start(
                    partial(_run, jobs, part),
                    partial(self._delivered, part, ready),
                    jobs[0].prepare_next if len(jobs) == 1 else None,
                )

    def _set_alarm(self) -> None:
        """Has one of those who wait ask again in time, where something waits for no event but time."""
        if self._scheduler.wake_at_s < math.inf:
            next(iter(self._waiting.values())).scope.deadline = self._scheduler.wake_at_s

    def _with_room(self, part: Part) -> list["_Waiting"]:
        """Those whose memory could be had; the others are over."""
        for work in part.works:
            waiting = self._waiting.get(work)
            if waiting is None:  # ended by one before it that needed its memory
                continue
            made_room = outcome.capture(waiting.job.make_room, part)
            if isinstance(made_room, outcome.Error):
                self._end(waiting, made_room)
        return [self._waiting[work] for work in part.works if work in self._waiting]

    def _note_start(self, part: Part, now_s: float) -> None:
        if part.kind is Kind.DECODE:
            self._queue_delay.note(now_s - min(work.arrived_s for work in part.works), now_s)

    def _delivered(
        self,
        part: Part,
        ran: Sequence["_Waiting"],
        result: outcome.Outcome[Sequence[outcome.Outcome[Result]]],
        took_s: float,
    ) -> None:
        """In the trio thread: a part is back from the device."""
        self._is_busy = False
        self._num_parts[part.kind] += 1
        self._num_tokens[part.kind] += part.num_finished_tokens
        self._busy_s[part.kind] += took_s
        if part.kind is Kind.DECODE:
            self._batch_sizes[part.num_rows] += 1
        self._scheduler.note(part, took_s, trio.current_time())
        if isinstance(result, outcome.Error):  # one for each: an outcome can be had only once
            results: Sequence[outcome.Outcome[Result]] = [outcome.Error(result.error) for _ in ran]
        else:
            results = result.unwrap()
        for waiting, each in zip(ran, results, strict=True):
            if isinstance(each, outcome.Error) or waiting.job.work.is_done:
                self._end(waiting, each)
        functions, self._when_idle = self._when_idle, []
        for function in functions:
            function()
        self._hand_over()

    def _end(self, waiting: "_Waiting", result: outcome.Outcome[Result]) -> None:
        if waiting.result is None:
            del self._waiting[waiting.job.work]
            self._scheduler.remove(waiting.job.work)
            waiting.wake_with(result)


class _Waiting:
    """A job, and the task that waits for it. (A `trio.Event` wakes a task as well, but takes twice as long.)"""

    __slots__ = ("_task", "job", "result", "scope")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.result: outcome.Outcome[Result] | None = None
        self.scope = trio.CancelScope()
        """Its deadline wakes the task, where somebody has to look again at some time."""
        self._task: trio.lowlevel.Task | None = None

    async def until_woken(self) -> None:
        """Returns when there is a result, or at the deadline."""

        def stop_waiting(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._task = trio.lowlevel.current_task()
        with self.scope:
            await trio.lowlevel.wait_task_rescheduled(stop_waiting)

    def wake_with(self, result: outcome.Outcome[Result]) -> None:
        self.result = result
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)
            self._task = None


def _run(jobs: Sequence[Job], part: Part) -> Sequence[outcome.Outcome[Result]]:
    """On the device."""
    first = jobs[0]
    return [outcome.capture(first.run, part)] if len(jobs) == 1 else first.run_together(jobs)
