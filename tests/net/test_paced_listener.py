"""A listener that takes its time."""

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.net.pace import Pace
from p2pswarm.net.paced_listener import PacedListener


class Endless(trio.abc.Listener[trio.SocketStream]):
    """Somebody connects all the time."""

    def __init__(self) -> None:
        self.is_closed = False

    async def accept(self) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        return trio.SocketStream(trio.socket.socket())

    async def aclose(self) -> None:
        self.is_closed = True


async def test_a_burst_is_taken_up_at_once_and_more_at_a_pace(autojump_clock: MockClock) -> None:
    listener = PacedListener(Endless(), Pace(rate_per_s=10, burst=20, now_s=trio.current_time()))
    accepted_at_s = []
    began_at_s = trio.current_time()
    for _ in range(41):
        await (await listener.accept()).aclose()
        accepted_at_s.append(trio.current_time() - began_at_s)
    assert accepted_at_s[20] == pytest.approx(0, abs=1e-6)
    assert accepted_at_s[40] == pytest.approx(2, abs=0.11)


async def test_closing_closes_what_is_under_it() -> None:
    inner = Endless()
    await PacedListener(inner, Pace(1, 1, trio.current_time())).aclose()
    assert inner.is_closed
