"""The one thread that owns the device: functions run on it one after the other, in the order they were asked for.

Knows nothing of torch or of requests. Measured on two 2.4 GHz cores: 60-130 us from a trio task to the thread and
back, of which 66 are the bare hand-over between two threads; `trio.to_thread` with a limiter of one costs 50 more,
and does not promise order or one and the same thread. Read `swarmd/handler.py` next.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

import outcome
import trio

from p2pswarm.core.errors import ServerBusy
from swarmd.queue_delay import QueueDelay

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

MAX_WAITING = 256
"""Requests in the queue, one per session: at 5 ms each the last one waits for 1.3 s. More are told to go elsewhere."""

REST_S = 0.002
"""Without work for so long, there is time for what can be done afterwards: by then an answer has left the process."""

LEAVE_TIMEOUT_S = 3.0
"""A prompt of some thousand tokens may end in that time; a download of weights will not."""


class Device(Protocol):
    """Runs functions where the device may be touched."""

    async def run(self, function: Callable[[], Result], afterwards: Callable[[], None] | None = None) -> Result:
        """What `function` returns or raises. Raises `ServerBusy` when too many wait already.

        `afterwards` is called once `function` has returned and nothing else is to be done for a while; or never.

        Cancelled while waiting, `function` never runs; cancelled while it runs, it runs to its end and its result is
        dropped.
        """
        ...


class InlineDevice:
    """Runs each function at once, in the caller's task: for tests on a simulated clock, which threads would outrun."""

    async def run(self, function: Callable[[], Result], afterwards: Callable[[], None] | None = None) -> Result:
        await trio.lowlevel.checkpoint()
        result = function()
        if afterwards is not None:
            afterwards()
        return result


class Job(Generic[Result]):
    """A function on its way through the queue, and the task that waits for it."""

    __slots__ = ("afterwards", "asked_at_s", "function", "started_at_s", "task")

    def __init__(
        self,
        function: Callable[[], Result],
        afterwards: Callable[[], None] | None,
        task: trio.lowlevel.Task,
        now_s: float,
    ) -> None:
        self.function: Callable[[], Result] | None = function
        """None once taken back."""
        self.task: trio.lowlevel.Task | None = task
        """None once it no longer waits. Touched by the trio thread only."""
        self.afterwards = afterwards
        self.asked_at_s = self.started_at_s = now_s


class DeviceThread:
    """A `Device` of one thread; made by `open_device_thread`."""

    def __init__(self, max_waiting: int, clock_s: Callable[[], float]) -> None:
        self._max_waiting = max_waiting
        self._clock_s = clock_s
        self._queue_delay = QueueDelay(clock_s())
        self._token = trio.lowlevel.current_trio_token()
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._afterwards: deque[Callable[[], None]] = deque(maxlen=max_waiting)
        """Left for when there is time; of too many the oldest are forgotten. Touched by the device's thread only."""
        self._num_waiting = 0
        # A daemon, so that a process told to stop need not wait for ever for what it computes or loads.
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)

    @property
    def num_waiting(self) -> int:
        """Functions handed in and not yet through, the running one included."""
        return self._num_waiting

    @property
    def queue_delay_s(self) -> float:
        """How long functions wait these days before they run."""
        return self._queue_delay.at(self._clock_s())

    async def run(self, function: Callable[[], Result], afterwards: Callable[[], None] | None = None) -> Result:
        if self._num_waiting >= self._max_waiting:
            raise ServerBusy(f"{self._num_waiting} requests are waiting for the device already")
        await trio.lowlevel.checkpoint_if_cancelled()
        job = Job(function, afterwards, trio.lowlevel.current_task(), self._clock_s())
        self._num_waiting += 1
        self._jobs.put(job)

        def take_back(_: object) -> trio.lowlevel.Abort:
            job.function = job.task = None
            self._num_waiting -= 1
            return trio.lowlevel.Abort.SUCCEEDED

        result: Result = await trio.lowlevel.wait_task_rescheduled(take_back)
        return result

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            function = job.function
            if function is None:
                continue
            job.started_at_s = self._clock_s()
            result = outcome.capture(function)
            try:
                self._token.run_sync_soon(self._deliver, job, result)
            except trio.RunFinishedError:
                return
            if job.afterwards is not None and isinstance(result, outcome.Value):
                self._afterwards.append(job.afterwards)
            del job, function, result  # they hold a request's tensors, and the next request may be far away

    def _next_job(self) -> Job[Any] | None:
        while self._afterwards:
            try:
                return self._jobs.get(timeout=REST_S)
            except queue.Empty:
                afterwards = self._afterwards.popleft()
            try:
                afterwards()
            except Exception:
                # Nobody waits for it, and the next request must find the thread alive.
                logger.exception("what was left for afterwards failed")
            del afterwards
        return self._jobs.get()

    def _deliver(self, job: Job[Any], result: outcome.Outcome[Any]) -> None:
        if job.task is None:
            if isinstance(result, outcome.Error):
                logger.debug("a function that nobody waits for any more failed", exc_info=result.error)
            return
        task, job.task, job.function = job.task, None, None
        self._num_waiting -= 1
        self._queue_delay.note(job.started_at_s - job.asked_at_s, self._clock_s())
        trio.lowlevel.reschedule(task, result)


@asynccontextmanager
async def open_device_thread(
    *, max_waiting: int = MAX_WAITING, clock_s: Callable[[], float] = time.perf_counter
) -> AsyncIterator[DeviceThread]:
    """A thread of its own, for as long as the context lasts. `clock_s` is asked by both threads.

    On the way out the running function is waited for, but not for long: `swarmd/launch.py` ends the process around it.
    """
    device = DeviceThread(max_waiting, clock_s)
    device._thread.start()
    try:
        yield device
    finally:
        device._jobs.put(None)
        with trio.move_on_after(LEAVE_TIMEOUT_S):
            await trio.to_thread.run_sync(device._thread.join, abandon_on_cancel=True)
