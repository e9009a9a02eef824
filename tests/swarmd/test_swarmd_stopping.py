"""What is under way when a node is told to stop."""

import os
import signal

import pytest
import trio
from trio.testing import MockClock

from swarmd.launch import leaves
from swarmd.stopping import stop_when_told, unless


async def test_the_first_signal_asks_and_the_second_insists() -> None:
    async with stop_when_told() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        await stop.wait()
        signal.raise_signal(signal.SIGINT)
        await trio.sleep_forever()


async def test_the_end_of_stdin_asks_too_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    monkeypatch.setattr("swarmd.stopping.STDIN", read_end)
    async with stop_when_told(with_stdin=True) as stop:
        os.write(write_end, b"nobody reads this\n")
        with trio.move_on_after(0.01):
            await stop.wait()
        assert not stop.is_set()
        os.close(write_end)
        await stop.wait()
    os.close(read_end)


async def test_a_node_may_end_before_its_stdin_does(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    monkeypatch.setattr("swarmd.stopping.STDIN", read_end)
    async with stop_when_told(with_stdin=True) as stop:
        signal.raise_signal(signal.SIGTERM)
        await stop.wait()
    os.close(write_end)


async def test_a_start_is_given_up_when_told_to_stop(autojump_clock: MockClock) -> None:
    stop = trio.Event()

    async def start() -> str:
        await trio.sleep(5)
        return "started"

    async def stop_soon(delay_s: float) -> None:
        await trio.sleep(delay_s)
        stop.set()

    assert await unless(stop, start) == "started"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_soon, 1)
        assert await unless(stop, start) is None
    assert trio.current_time() < 7


def test_one_message_is_said_once_however_deep_it_lies() -> None:
    same = [ValueError("taken"), ValueError("taken")]
    group = BaseExceptionGroup("outer", [BaseExceptionGroup("inner", same), ValueError("other")])
    assert [str(leaf) for leaf in leaves(group)] == ["taken", "other"]
