"""`PacedListener`: a listener that takes up only so many connections a second; the system keeps the others waiting."""

import trio

from p2pswarm.net.pace import Pace


class PacedListener(trio.abc.Listener[trio.SocketStream]):
    """`listener`, at the pace that it may share with others."""

    def __init__(self, listener: trio.abc.Listener[trio.SocketStream], pace: Pace) -> None:
        self._listener = listener
        self._pace = pace

    async def accept(self) -> trio.SocketStream:
        await trio.sleep_until(self._pace.ready_at_s(trio.current_time()))
        stream = await self._listener.accept()
        self._pace.spend(1, trio.current_time())
        return stream

    async def aclose(self) -> None:
        await self._listener.aclose()
