"""A secure transport without sockets or secrets, for tests of the muxer."""

from collections.abc import Callable, Sequence

import pytest
import trio
from trio.testing import memory_stream_pair

from p2pswarm.core.errors import ConnectionLost


class PipeTransport:
    """One end of a pipe in memory, as `net.mux_transports.SecureTransport`; nothing goes out without waiting."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self.stream = stream
        self._left = b""

    async def read_some(self) -> bytes:
        try:
            return await self.stream.receive_some()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost("the pipe broke") from error

    async def write_all(self, buffers: Sequence[bytes | memoryview]) -> None:
        data, self._left = self._left + b"".join(buffers), b""
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost("the pipe broke") from error

    def write_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
        self._left = b"".join(buffers)
        return False

    async def close(self) -> None:
        await self.stream.aclose()


@pytest.fixture
def new_pipe() -> Callable[[], tuple[PipeTransport, PipeTransport]]:
    def make() -> tuple[PipeTransport, PipeTransport]:
        one, other = memory_stream_pair()
        return PipeTransport(one), PipeTransport(other)

    return make
