"""The one thread that owns the device: functions run on it one after the other, in the order they were handed in.

Knows nothing of torch or of requests. Measured on two 2.4 GHz cores: 60-130 us from a trio task to the thread and
back, of which 66 are the bare hand-over between two threads; `trio.to_thread` with a limiter of one costs 50 more,
and does not promise order or one and the same thread. Read `swarmd/scheduling/dispatcher.py` next.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar

import outcome
import trio

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Deliver = Callable[[outcome.Outcome[Result], float], None]
"""Takes what a function made, and the seconds it took, in the trio thread. It must not raise."""

REST_S = 0.002
"""Without work for so long, there is time for what can be done afterwards: by then an answer has left the process."""

MAX_AFTERWARDS = 256

LEAVE_TIMEOUT_S = 3.0
"""A prompt of some thousand tokens may end in that time; a download of weights will not."""


class Device(Protocol):
    """Runs functions where the device may be touched."""

    def start(
        self,
        function: Callable[[], Result],
        deliver: Deliver[Result],
        afterwards: Callable[[], None] | None = None,
    ) -> None:
        """Runs `function` after those handed in before, then calls `deliver` in the trio thread.

        `afterwards` is called like `function`, once that has returned and nothing else is to be done for a while; or
        never.
        """
        ...

    async def run(self, function: Callable[[], Result]) -> Result:
        """What `function` returns or raises.

        Cancelled while waiting, `function` never runs; cancelled while it runs, it runs to its end and its result is
        dropped.
        """
        ...


class InlineDevice:
    """Runs each function in the trio thread: for tests on a simulated clock, which threads would outrun."""

    def start(
        self,
        function: Callable[[], Result],
        deliver: Deliver[Result],
        afterwards: Callable[[], None] | None = None,
    ) -> None:
        def work() -> None:
            deliver(outcome.capture(function), 0.0)
            if afterwards is not None:
                afterwards()

        trio.lowlevel.current_trio_token().run_sync_soon(work)

    async def run(self, function: Callable[[], Result]) -> Result:
        await trio.lowlevel.checkpoint()
        return function()


class Job(Generic[Result]):
    """A function on its way to the thread, and who takes what it makes."""

    __slots__ = ("afterwards", "deliver", "function")

    def __init__(
        self, function: Callable[[], Result], deliver: Deliver[Result], afterwards: Callable[[], None] | None
    ) -> None:
        self.function: Callable[[], Result] | None = function
        """None once taken back."""
        self.deliver = deliver
        self.afterwards = afterwards


class DeviceThread:
    """A `Device` of one thread; made by `open_device_thread`."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._token = trio.lowlevel.current_trio_token()
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._afterwards: deque[Callable[[], None]] = deque(maxlen=MAX_AFTERWARDS)
        """Left for when there is time; of too many the oldest are forgotten. Touched by the device's thread only."""
        # A daemon, so that a process told to stop need not wait for ever for what it computes or loads.
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)

    def start(
        self,
        function: Callable[[], Result],
        deliver: Deliver[Result],
        afterwards: Callable[[], None] | None = None,
    ) -> None:
        self._jobs.put(Job(function, deliver, afterwards))

    async def run(self, function: Callable[[], Result]) -> Result:
        await trio.lowlevel.checkpoint_if_cancelled()
        task: trio.lowlevel.Task | None = trio.lowlevel.current_task()

        def deliver(result: outcome.Outcome[Result], _: float) -> None:
            if task is not None:
                trio.lowlevel.reschedule(task, result)

        job = Job(function, deliver, None)
        self._jobs.put(job)

        def take_back(_: object) -> trio.lowlevel.Abort:
            nonlocal task
            job.function = task = None
            return trio.lowlevel.Abort.SUCCEEDED

        result: Result = await trio.lowlevel.wait_task_rescheduled(take_back)
        return result

    def _work(self) -> None:
        with suppress(trio.RunFinishedError):
            while (job := self._next_job()) is not None:
                function = job.function
                if function is None:
                    continue
                started_s = self._clock_s()
                result = outcome.capture(function)
                self._token.run_sync_soon(job.deliver, result, self._clock_s() - started_s)
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


@asynccontextmanager
async def open_device_thread(*, clock_s: Callable[[], float] = time.perf_counter) -> AsyncIterator[DeviceThread]:
    """A thread of its own, for as long as the context lasts. `clock_s` is asked by that thread.

    On the way out the running function is waited for, but not for long: `swarmd/launch.py` ends the process around it.
    """
    device = DeviceThread(clock_s)
    device._thread.start()
    try:
        yield device
    finally:
        device._jobs.put(None)
        with trio.move_on_after(LEAVE_TIMEOUT_S):
            await trio.to_thread.run_sync(device._thread.join, abandon_on_cancel=True)
