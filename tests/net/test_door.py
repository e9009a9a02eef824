"""The door: handshakes one after the other within their share, deadlines for the silent, and who is shut out."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.net.admission import TOLERATED_FAILURES, Source
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.door import Door

A, B = Source("a"), Source("b")
CONFIG = NetworkConfig(max_entrants=3, dial_timeout_s=8.0, first_bytes_timeout_s=3.0)


@asynccontextmanager
async def open_door(config: NetworkConfig = CONFIG) -> AsyncIterator[Door]:
    door = Door(config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.run)
        yield door
        nursery.cancel_scope.cancel()
    assert door.num_present == 0


async def greet(name: str = "guest") -> str:
    await trio.sleep(0.1)
    return name


async def fail() -> str:
    await trio.lowlevel.checkpoint()
    raise ConnectionLost("garbage")


async def test_who_speaks_gets_in(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        assert await door.admit(A, trio.lowlevel.checkpoint, greet) == "guest"


async def test_who_says_nothing_is_sent_away(autojump_clock: MockClock) -> None:
    began_at_s = trio.current_time()
    async with open_door() as door:
        with pytest.raises(ConnectionLost, match="not a byte"):
            await door.admit(A, trio.sleep_forever, greet)
        assert trio.current_time() - began_at_s == pytest.approx(3)


async def test_who_stops_in_the_middle_is_sent_away(autojump_clock: MockClock) -> None:
    began_at_s = trio.current_time()
    async with open_door() as door:
        with pytest.raises(ConnectionLost, match="time"):
            await door.admit(A, trio.lowlevel.checkpoint, trio.sleep_forever)
        assert trio.current_time() - began_at_s == pytest.approx(8)


async def test_one_who_hangs_keeps_nobody_waiting(autojump_clock: MockClock) -> None:
    began_at_s = trio.current_time()
    async with open_door() as door, trio.open_nursery() as nursery:

        async def hang() -> None:
            with contextlib.suppress(ConnectionLost):
                await door.admit(A, trio.lowlevel.checkpoint, trio.sleep_forever)

        nursery.start_soon(hang)
        await trio.sleep(0.1)
        await door.admit(A, trio.lowlevel.checkpoint, greet)
        assert trio.current_time() - began_at_s < 0.5


async def test_the_silent_make_room_for_a_newcomer(autojump_clock: MockClock) -> None:
    outcomes: list[str] = []
    async with open_door() as door, trio.open_nursery() as nursery:

        async def stay_silent(name: str) -> None:
            try:
                await door.admit(A, trio.sleep_forever, greet)
            except ConnectionLost:
                outcomes.append(f"{name} left at {trio.current_time() - began_at_s:.0f} s")

        began_at_s = trio.current_time()
        for name in ("first", "second", "third"):
            nursery.start_soon(stay_silent, name)
            await trio.sleep(0.1)
        assert await door.admit(B, trio.lowlevel.checkpoint, greet) == "guest"
    assert outcomes == ["first left at 0 s", "second left at 3 s", "third left at 3 s"]


async def test_the_door_shuts_after_many_failures_and_opens_again(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_door() as door:
        for _ in range(TOLERATED_FAILURES + 1):
            assert not door.is_shut_to(A)
            with pytest.raises(ConnectionLost, match="garbage"):
                await door.admit(A, trio.lowlevel.checkpoint, fail)
        assert door.is_shut_to(A)
        assert not door.is_shut_to(B)
        await trio.sleep(10)
        assert not door.is_shut_to(A)
    assert "connections from a keep failing" in caplog.text


async def test_the_door_shuts_to_a_crowd_that_says_nothing(autojump_clock: MockClock) -> None:
    async with open_door() as door, trio.open_nursery() as nursery:

        async def stay_silent() -> None:
            with contextlib.suppress(ConnectionLost):
                await door.admit(A, partial(trio.sleep, 2), greet)

        for _ in range(3 * TOLERATED_FAILURES):
            nursery.start_soon(stay_silent)
        await trio.sleep(1)
        assert door.num_present == 3
        assert door.is_shut_to(A)
        assert not door.is_shut_to(B)


async def test_who_waits_for_its_turn_in_vain_has_done_nothing(autojump_clock: MockClock) -> None:
    door = Door(CONFIG)  # nobody lets anybody in
    for _ in range(2 * TOLERATED_FAILURES):
        with pytest.raises(ConnectionLost, match="time"):
            await door.admit(A, trio.lowlevel.checkpoint, greet)
    assert not door.is_shut_to(A)
