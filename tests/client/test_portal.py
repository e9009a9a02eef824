"""Blocking code gets results, errors and order of shutdown through the portal as async code would."""

import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from p2pswarm.client.portal import Portal
from p2pswarm.core.errors import PeerUnreachable, SessionClosed


async def double(number: int) -> int:
    await trio.lowlevel.checkpoint()
    if number < 0:
        raise PeerUnreachable(f"{number} is below zero")
    return number * 2


def test_results_and_typed_errors_cross_the_portal() -> None:
    with Portal() as portal:
        assert portal.call(double, 21) == 42
        with pytest.raises(PeerUnreachable, match="-1 is below zero"):
            portal.call(double, -1)


def test_several_threads_call_at_once() -> None:
    results: list[int] = []
    with Portal() as portal:
        threads = [threading.Thread(target=lambda n=n: results.append(portal.call(double, n))) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == [2 * n for n in range(20)]


@asynccontextmanager
async def noted(name: str, notes: list[str]) -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        notes.append(f"enter {name}")
        try:
            yield name
        finally:
            notes.append(f"leave {name}")
            nursery.cancel_scope.cancel()


def test_open_managers_are_left_newest_first_when_the_portal_closes() -> None:
    notes: list[str] = []
    portal = Portal()
    assert portal.enter(noted("a", notes)).value == "a"
    portal.enter(noted("b", notes))
    portal.enter(noted("c", notes)).leave()
    portal.close()
    assert notes == ["enter a", "enter b", "enter c", "leave c", "leave b", "leave a"]


def test_error_on_entering_is_the_managers_own() -> None:
    @asynccontextmanager
    async def refusing() -> AsyncIterator[None]:
        async with trio.open_nursery():
            raise PeerUnreachable("nobody there")
        yield

    with Portal() as portal:
        with pytest.raises(PeerUnreachable, match="nobody there"):
            portal.enter(refusing())
        assert portal.call(double, 1) == 2


def test_error_on_leaving_is_raised_by_leave_and_harms_nobody_else() -> None:
    @asynccontextmanager
    async def failing() -> AsyncIterator[None]:
        yield
        raise PeerUnreachable("lost at the end")

    with Portal() as portal:
        entered = portal.enter(failing())
        with pytest.raises(PeerUnreachable, match="lost at the end"):
            entered.leave()
        entered.leave()
        assert portal.call(double, 1) == 2


def test_closed_portal_says_so() -> None:
    portal = Portal()
    portal.close()
    portal.close()
    with pytest.raises(SessionClosed, match="closed"):
        portal.call(double, 1)


def test_waiting_call_ends_when_another_thread_closes_the_portal() -> None:
    portal = Portal()
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            portal.call(trio.sleep_forever)
        except SessionClosed as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    portal.close()
    thread.join(5)
    assert len(raised) == 1


def test_forgotten_portal_leaves_its_managers_when_the_interpreter_ends() -> None:
    program = """
from contextlib import asynccontextmanager
from p2pswarm.client.portal import Portal
@asynccontextmanager
async def manager():
    yield
    print("left")
portal = Portal()
portal.enter(manager())
print("end of program")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert (done.stdout, done.stderr) == ("end of program\nleft\n", "")
