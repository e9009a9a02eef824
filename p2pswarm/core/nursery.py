"""A nursery for `async with` blocks whose callers want to catch errors by their class.

Trio wraps what leaves a nursery in an exception group, also when it is one exception of the block itself. That is
right where tasks fail side by side; a resource such as a network, whose tasks do not fail, should pass its user's
exceptions through.
"""

import contextlib
from collections.abc import AsyncIterator

import trio


@contextlib.asynccontextmanager
async def open_transparent_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery out of which a single exception comes as it is; several still come as a group."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from group.exceptions[0].__cause__
