"""A device that takes simulated time, for one function after the other."""

from collections.abc import Callable
from typing import Any

import outcome
import trio

from swarmd.device_thread import REST_S


class TimedDevice:
    """A `swarmd.device_thread.Device`; its tasks live in `nursery`."""

    def __init__(self, nursery: trio.Nursery, work_s: float = 0.1) -> None:
        self.work_s = work_s
        """How long each function takes, besides what it spends itself."""
        self.num_started = 0
        self._nursery = nursery
        self._spent_s = 0.0
        self._turn = trio.StrictFIFOLock()

    def spend(self, seconds: float) -> None:
        """Called by a function: it takes longer."""
        self._spent_s += seconds

    def start(
        self,
        function: Callable[[], Any],
        deliver: Callable[[outcome.Outcome[Any], float], None],
        afterwards: Callable[[], None] | None = None,
    ) -> None:
        self.num_started += 1
        self._nursery.start_soon(self._work, function, deliver, afterwards)

    async def run(self, function: Callable[[], Any]) -> Any:
        done = trio.Event()
        results: list[outcome.Outcome[Any]] = []

        def deliver(result: outcome.Outcome[Any], took_s: float) -> None:
            results.append(result)
            done.set()

        self.start(function, deliver)
        await done.wait()
        return results[0].unwrap()

    async def _work(
        self,
        function: Callable[[], Any],
        deliver: Callable[[outcome.Outcome[Any], float], None],
        afterwards: Callable[[], None] | None,
    ) -> None:
        async with self._turn:
            self._spent_s = self.work_s
            result = outcome.capture(function)
            took_s = self._spent_s
            await trio.sleep(took_s)
            num_started = self.num_started
            deliver(result, took_s)
        await trio.sleep(REST_S)
        if afterwards is not None and self.num_started == num_started:
            afterwards()
