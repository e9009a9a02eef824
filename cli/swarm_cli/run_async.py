"""Runs a command's async part, with errors and interrupts as blocking code would see them."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from p2pswarm.client.single_error import single_error

T = TypeVar("T")


def run_async(function: Callable[[], Awaitable[T]]) -> T:
    """What `function()` gives, in a trio loop of its own."""
    with single_error():
        return trio.run(function)
