"""Runs a command's async part, with errors, interrupts and signals as blocking code would see them."""

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from p2pswarm.client.single_error import single_error

T = TypeVar("T")

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def run_async(function: Callable[[], Awaitable[T]]) -> T:
    """What `function()` gives, in a trio loop of its own.

    SIGTERM and SIGHUP cancel it, so that everything is closed in order and no process of ours is left behind; then they
    raise `SystemExit` with the status by which shells report them. Ctrl-C raises `KeyboardInterrupt`.
    """
    with single_error():
        return trio.run(_until_signal, function)


async def _until_signal(function: Callable[[], Awaitable[T]]) -> T:
    received: list[int] = []

    async def listen() -> None:
        with trio.open_signal_receiver(*ENDING_SIGNALS) as signals:
            async for number in signals:
                received.append(number)
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        result = await function()
        nursery.cancel_scope.cancel()
    if received:
        raise SystemExit(128 + received[0])
    return result
