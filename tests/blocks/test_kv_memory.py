"""Resident memory follows the pages that are used, and does not creep."""

import random
from pathlib import Path

import pytest
import torch

from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.blocks.kv_pool import KVPool, LayerShape, StateShape
from p2pswarm.blocks.pages import PAGE_TOKENS, OutOfPages
from p2pswarm.core.span import Span

NUM_LAYERS, HEADS, HEAD_SIZE = 2, 8, 64
STATES = StateShape(HEADS, HEAD_SIZE, torch.float32)
MAX_LENGTH = 200
STATM = Path("/proc/self/statm")
SLACK_BYTES = 8 << 20
"""The pool's own bookkeeping, torch's scratch memory, the kernel's rounding."""

pytestmark = pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * 4096


def new_pool(num_pages: int) -> KVPool:
    return KVPool({index: LayerShape(STATES, STATES) for index in range(NUM_LAYERS)}, num_pages, torch.device("cpu"))


def new_cache(pool: KVPool, num_rows: int, max_length: int) -> SpanCache:
    return SpanCache(Span(0, NUM_LAYERS), [None] * NUM_LAYERS, pool, num_rows, max_length)


def write(cache: SpanCache, num_tokens: int) -> None:
    cache.make_room(cache.length, num_tokens)
    cache.place()
    states = torch.ones(cache.num_sequences, HEADS, num_tokens, HEAD_SIZE)
    for index in range(NUM_LAYERS):
        cache.update(states, states, index)


@pytest.mark.own_process
def test_memory_that_nobody_has_used_is_not_resident() -> None:
    before = resident_bytes()
    pool = new_pool(1024)
    assert pool.size_bytes == 256 << 20
    assert resident_bytes() - before < SLACK_BYTES

    write(new_cache(pool, 2, 128 * PAGE_TOKENS), 128 * PAGE_TOKENS)

    assert pool.used_bytes == 64 << 20
    assert abs(resident_bytes() - before - pool.used_bytes) < 2 * SLACK_BYTES


@pytest.mark.slow
@pytest.mark.own_process
def test_thousands_of_sessions_take_no_more_memory_than_the_first_ones() -> None:
    torch.set_num_threads(1)
    randomness = random.Random(7)
    pool = new_pool(100)
    sessions: list[SpanCache] = []
    resident = []
    for _ in range(2000):
        sessions.append(new_cache(pool, randomness.randint(1, 3), randomness.randint(1, MAX_LENGTH)))
        try:
            for session in (sessions[-1], randomness.choice(sessions)):
                write(session, min(randomness.randint(1, 60), MAX_LENGTH - session.length))
        except OutOfPages:
            sessions.pop(0).release()
        while len(sessions) > 20:
            sessions.pop(randomness.randrange(len(sessions))).release()
        assert pool.pages.num_used == sum(session.num_pages for session in sessions)
        resident.append(resident_bytes())
    for session in sessions:
        session.release()

    assert pool.used_bytes == 0
    assert max(resident) - max(resident[:200]) < SLACK_BYTES
