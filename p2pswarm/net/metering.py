"""What a part of a task costs in CPU time, its waiting not counted: the hands of others are not on this clock."""

import time
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Metered(Generic[Result]):
    """`await metered` gives what `await function()` gives; `seconds` is what its own steps have taken so far.

    The steps of tasks that it starts do not count. Cancellation and exceptions pass through.
    """

    def __init__(
        self, function: Callable[[], Awaitable[Result]], clock: Callable[[], float] = time.thread_time
    ) -> None:
        self.seconds = 0.0
        self._function = function
        self._clock = clock

    def __await__(self) -> Generator[Any, Any, Result]:
        steps = self._function().__await__()
        resume = partial(next, steps)
        while True:
            began_at_s = self._clock()
            try:
                trap = resume()
            except StopIteration as end:
                result: Result = end.value
                return result
            finally:
                self.seconds += self._clock() - began_at_s
            try:
                sent = yield trap
            except BaseException as error:  # noqa: BLE001 - thrown into the steps, which decide what becomes of it
                resume = partial(steps.throw, error)
            else:
                resume = partial(steps.send, sent)
