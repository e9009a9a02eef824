"""One thread, in order; what is cancelled while it waits never runs, what fails fails at its caller."""

import itertools
import threading
from functools import partial

import outcome
import pytest
import trio
import trio.testing

from swarmd.device_thread import open_device_thread

LONGEST_WAIT_S = 10.0
"""Of the thread for a test that has failed meanwhile."""


async def test_functions_run_on_one_thread_in_the_order_they_were_asked_for() -> None:
    ran: list[int] = []
    threads = set()

    async def ask(number: int) -> None:
        def work() -> int:
            ran.append(number)
            threads.add(threading.get_ident())
            return number * number

        assert await device.run(work) == number * number

    async with open_device_thread() as device:
        gate = threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.run, partial(gate.wait, LONGEST_WAIT_S))
            for number in range(50):
                nursery.start_soon(ask, number)
                await trio.testing.wait_all_tasks_blocked()
            gate.set()
    assert ran == list(range(50))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_an_exception_becomes_the_callers() -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    async with open_device_thread() as device:
        with pytest.raises(RuntimeError, match="out of memory"):
            await device.run(fail)
        assert await device.run(lambda: "still there") == "still there"


async def test_what_is_cancelled_while_waiting_never_runs() -> None:
    ran: list[str] = []
    gate = threading.Event()
    async with open_device_thread() as device, trio.open_nursery() as nursery:
        nursery.start_soon(device.run, partial(gate.wait, LONGEST_WAIT_S))
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.01) as scope:
            await device.run(lambda: ran.append("cancelled"))
        assert scope.cancelled_caught
        gate.set()
        await device.run(lambda: ran.append("after"))
    assert ran == ["after"]


async def test_what_is_cancelled_while_it_runs_ends_and_its_result_is_dropped() -> None:
    started, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        gate.wait(LONGEST_WAIT_S)
        ended.set()

    async with open_device_thread() as device:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(device.run, work)
                await trio.to_thread.run_sync(started.wait)
                scope.cancel()
        assert scope.cancelled_caught
        assert not ended.is_set()
        gate.set()
        assert await device.run(lambda: "next") == "next"
        assert ended.is_set()


async def test_leaving_waits_for_what_runs() -> None:
    ended = threading.Event()
    started = threading.Event()

    def work() -> None:
        started.set()
        gate.wait(0.05)
        ended.set()

    gate = threading.Event()
    async with open_device_thread() as device:
        with trio.move_on_after(0):
            await device.run(work)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(device.run, work)
                await trio.to_thread.run_sync(started.wait)
                scope.cancel()
    assert ended.is_set()
    assert not any(thread.name == "device" for thread in threading.enumerate())


async def test_leaving_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmd.device_thread.LEAVE_TIMEOUT_S", 0.02)
    started, gate = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        gate.wait(LONGEST_WAIT_S)

    async with open_device_thread() as device, trio.open_nursery() as nursery:
        nursery.start_soon(device.run, work)
        await trio.to_thread.run_sync(started.wait)
        nursery.cancel_scope.cancel()
    (left_behind,) = (thread for thread in threading.enumerate() if thread.name == "device")
    gate.set()
    left_behind.join(LONGEST_WAIT_S)


async def test_what_is_started_is_delivered_with_the_time_it_took() -> None:
    delivered: list[tuple[str, float]] = []
    times_s = itertools.count(10.0, 2.5)

    async with open_device_thread(clock_s=lambda: next(times_s)) as device:
        for name in ("first", "second"):
            device.start(lambda name=name: name, lambda result, took_s: delivered.append((result.unwrap(), took_s)))
        await device.run(lambda: None)
    assert delivered == [("first", 2.5), ("second", 2.5)]


async def test_a_failure_is_delivered_too() -> None:
    delivered: list[outcome.Outcome[None]] = []
    async with open_device_thread() as device:
        device.start(fail, lambda result, _: delivered.append(result))
        assert await device.run(lambda: "still there") == "still there"
    assert isinstance(delivered[0], outcome.Error)
    assert str(delivered[0].error) == "out of memory"


async def test_what_is_left_for_afterwards_runs_when_nothing_waits() -> None:
    ran: list[str] = []
    done, gate = threading.Event(), threading.Event()

    def finish() -> None:
        ran.append("afterwards")
        done.set()

    async with open_device_thread() as device:
        device.start(partial(gate.wait, LONGEST_WAIT_S), ignore, finish)
        device.start(lambda: ran.append("next"), ignore)
        gate.set()
        assert await trio.to_thread.run_sync(done.wait, LONGEST_WAIT_S)
    assert ran == ["next", "afterwards"]


async def test_what_fails_afterwards_is_logged_and_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    failed = threading.Event()

    def fail_and_tell() -> None:
        failed.set()
        fail()

    async with open_device_thread() as device:
        device.start(lambda: "answered", ignore, fail_and_tell)
        assert await trio.to_thread.run_sync(failed.wait, LONGEST_WAIT_S)
        assert await device.run(lambda: "still there") == "still there"
    assert "out of memory" in caplog.text


async def test_nothing_is_done_after_a_failure() -> None:
    ran: list[str] = []
    async with open_device_thread() as device:
        device.start(fail, ignore, lambda: ran.append("afterwards"))
        await trio.sleep(0.02)
    assert not ran


def fail() -> None:
    raise RuntimeError("out of memory")


def ignore(result: outcome.Outcome[object], took_s: float) -> None:
    """Nobody waits for it."""
