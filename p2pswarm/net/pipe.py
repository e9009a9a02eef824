"""A raw flow of bytes to one machine, under the encryption: a TCP connection, or a circuit through a relay.

What the two differ in is here; the handshake, the noise session and the muxer run over a `Pipe`.
"""

import ipaddress
import os
from typing import Protocol

import trio

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.path import ConnectionPath

CAN_WRITE_TO_SOCKETS = os.name == "posix"
"""A socket is a file there. Trio has no way to send without waiting, nor to get at its socket."""
SOCKET_ERRORS = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


class Pipe(Protocol):
    """Bytes both ways, in order; one reader and one writer at a time. All of it raises `ConnectionLost`."""

    @property
    def path(self) -> ConnectionPath: ...

    @property
    def is_socket(self) -> bool:
        """Or else it runs over another connection of this node."""
        ...

    async def send_all(self, data: bytes | bytearray) -> None:
        """Returns when all is on its way; cancelled, it may have sent a part."""
        ...

    async def receive_some(self, max_bytes: int) -> bytes:
        """What has arrived, at least one byte; `b""` at the end."""
        ...

    def send_now(self, data: bytes | bytearray) -> int:
        """Sends what goes without waiting; how many bytes that was. Not while `send_all` is under way."""
        ...

    async def aclose(self) -> None:
        """Ends it both ways. Safe twice; done even when cancelled."""
        ...

    async def wait_closed(self) -> None:
        """Returns once it was closed here: nobody needs what it runs over any more."""
        ...


class TcpPipe:
    """A `Pipe` that is one TCP connection, to the peer itself where no other `path` is given."""

    is_socket = True

    def __init__(self, stream: trio.SocketStream, path: ConnectionPath | None = None) -> None:
        self.path = path or ConnectionPath(remote=remote_address(stream))
        self._stream = stream
        self._closed = trio.Event()

    async def send_all(self, data: bytes | bytearray) -> None:
        try:
            await self._stream.send_all(data)
        except SOCKET_ERRORS as error:
            raise ConnectionLost(f"the connection broke: {error}") from error

    async def receive_some(self, max_bytes: int) -> bytes:
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except SOCKET_ERRORS as error:
            raise ConnectionLost(f"the connection broke: {error}") from error

    def send_now(self, data: bytes | bytearray) -> int:
        if not CAN_WRITE_TO_SOCKETS:
            return 0
        try:
            return os.write(self._stream.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ConnectionLost(f"the connection broke: {error}") from error

    async def send_eof(self) -> None:
        """Tells the other end that no more will come; receiving goes on."""
        try:
            await self._stream.send_eof()
        except SOCKET_ERRORS as error:
            raise ConnectionLost(f"the connection broke: {error}") from error

    def close_now(self) -> None:
        """Like `aclose`, without waiting; wakes who is sending or receiving."""
        self._closed.set()
        self._stream.socket.close()

    async def aclose(self) -> None:
        self._closed.set()
        await self._stream.aclose()

    async def wait_closed(self) -> None:
        await self._closed.wait()


def remote_address(stream: trio.SocketStream) -> TcpAddress | None:
    """Where the other end of the socket is; None when it has gone already."""
    try:
        host, port, *_ = stream.socket.getpeername()
    except OSError:
        return None
    ip = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return TcpAddress(f"ip{ip.version}", str(ip), port)
