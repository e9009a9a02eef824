"""Tasks that outlive the call that began them, but not the node."""

from collections.abc import Awaitable, Callable
from typing import TypeVarTuple, Unpack

import trio

Arguments = TypeVarTuple("Arguments")


class Background:
    """A nursery that the parts of a node share while it runs."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled, and all tasks with it."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def start_soon(self, function: Callable[[Unpack[Arguments]], Awaitable[object]], *arguments: *Arguments) -> None:
        if self._nursery is None:
            raise RuntimeError("a DHT node works only while its `run` does")
        self._nursery.start_soon(function, *arguments)
