"""Gives memory back that a node no longer uses: whoever lends a machine has other uses for it.

After many requests at once, C's heap keeps what they took for the next ones: 30 MiB after some seconds of forged
records, for good. Looking through the heap of a server takes one ms.
"""

from collections.abc import Callable

import trio

from p2pswarm.blocks.heap import trim_heap

PERIOD_S = 10.0


async def give_unused_memory_back(trim: Callable[[], None] = trim_heap, period_s: float = PERIOD_S) -> None:
    """Until cancelled, now and then."""
    while True:
        await trio.sleep(period_s)
        await trio.to_thread.run_sync(trim)
