"""Being told to stop. SIGINT and SIGTERM: the first asks a node to stop in order, the second makes it stop at once."""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from p2pswarm.core.nursery import open_transparent_nursery

Result = TypeVar("Result")


@asynccontextmanager
async def stop_on_signals() -> AsyncIterator[trio.Event]:
    """An event that the first signal sets; the second one cancels the body of the context."""
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for _ in signals:
                    if stop.is_set():
                        nursery.cancel_scope.cancel()
                    stop.set()

            nursery.start_soon(listen)
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
