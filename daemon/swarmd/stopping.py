"""Being told to stop.

SIGINT and SIGTERM: the first asks a node to stop in order, the second makes it stop at once. The end of stdin, where
asked for, is like a first signal: a program that starts a server and holds the other end of a pipe takes it along when
it ends, however it ends.
"""

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import trio

from p2pswarm.core.nursery import open_transparent_nursery

Result = TypeVar("Result")

STDIN = 0


@asynccontextmanager
async def stop_when_told(*, with_stdin: bool = False) -> AsyncIterator[trio.Event]:
    """An event that the first signal sets, or the end of stdin; another signal cancels the body of the context."""
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for _ in signals:
                    if stop.is_set():
                        nursery.cancel_scope.cancel()
                    stop.set()

            async def wait_for_end_of_stdin() -> None:
                await trio.to_thread.run_sync(_read_to_the_end, STDIN, abandon_on_cancel=True)
                stop.set()

            nursery.start_soon(listen)
            if with_stdin:
                nursery.start_soon(wait_for_end_of_stdin)
            yield stop
            nursery.cancel_scope.cancel()


async def unless(stop: trio.Event, function: Callable[[], Awaitable[Result]]) -> Result | None:
    """What the function returns; None, and it is cancelled, where `stop` is set first."""
    async with open_transparent_nursery() as nursery:

        async def give_up() -> None:
            await stop.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        result = await function()
        nursery.cancel_scope.cancel()
        return result
    return None


def _read_to_the_end(descriptor: int) -> None:
    """On a thread of its own, since only there can every kind of stdin be waited for, on every system."""
    with suppress(OSError):  # closed, or its terminal is gone
        while os.read(descriptor, 4096):
            pass
