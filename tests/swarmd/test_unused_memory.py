"""A node returns what is free in its heap, again and again."""

import sys
from pathlib import Path

import psutil
import pytest
import trio

from p2pswarm.blocks.heap import trim_heap
from swarmd.unused_memory import give_unused_memory_back

TIMEOUT_S = 10
NUM_PIECES, PIECE_BYTES = 20_000, 2000
"""Too small for mappings of their own, too large for Python's own pools."""


async def test_the_heap_is_trimmed_again_and_again() -> None:
    num_trims, was_trimmed = 0, trio.Event()

    def trim() -> None:
        nonlocal num_trims
        num_trims += 1
        if num_trims == 3:
            trio.from_thread.run_sync(was_trimmed.set)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_unused_memory_back, trim, 0.001)
        with trio.fail_after(TIMEOUT_S):
            await was_trimmed.wait()
        nursery.cancel_scope.cancel()


@pytest.mark.own_process
@pytest.mark.skipif(sys.platform != "linux" or not Path("/proc/self/statm").exists(), reason="glibc's heap is trimmed")
def test_what_was_freed_among_what_is_held_is_not_resident_any_more() -> None:
    process = psutil.Process()
    pieces = [bytes(PIECE_BYTES) for _ in range(NUM_PIECES)]
    held = pieces[::100]
    before_bytes = process.memory_info().rss
    del pieces
    trim_heap()
    freed_bytes = before_bytes - process.memory_info().rss
    assert freed_bytes > NUM_PIECES * PIECE_BYTES / 2
    del held
