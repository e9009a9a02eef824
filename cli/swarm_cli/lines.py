"""The lines that another process writes, as they come."""

from typing import Self

import trio

MAX_LINE_BYTES = 1 << 20
"""Of a longer line without end, only the last part is kept."""


class Lines:
    """For `async for`, which may be left and begun again: unlike an async generator it has nothing to clean up."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._unread = b""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while b"\n" not in self._unread:
            data = await self._stream.receive_some()
            if not data:
                return self._rest()
            self._unread = (self._unread + data)[-MAX_LINE_BYTES:]
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace")

    def _rest(self) -> str:
        """What stands after the last line's end, if anything does."""
        if not self._unread:
            raise StopAsyncIteration
        rest, self._unread = self._unread, b""
        return rest.decode(errors="replace")
