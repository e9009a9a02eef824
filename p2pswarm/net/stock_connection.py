"""A connection over py-libp2p's own yamux, made safe to use: for libp2p nodes that do not speak our muxer.

Stock yamux corrupts the whole connection when a read or a write is cancelled in the middle, so neither ever is: each
stream has a task that reads ahead, and writes are shielded. It gives no sign of dead peers and stalls at 256 streams;
nodes of a swarm speak `mux_connection.py` among themselves and never come here.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable

import trio

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.libp2p_parts import (
    IMuxedConn,
    IMuxedStream,
    IOException,
    MuxedConnError,
    MuxedStreamEOF,
    MuxedStreamError,
)
from p2pswarm.net.network import Buffer
from p2pswarm.net.path import ConnectionPath

READ_AHEAD_BYTES = 256 * 1024
STREAM_ERRORS = (MuxedStreamError, MuxedConnError, IOException, OSError, RuntimeError, trio.BrokenResourceError)
"""What yamux raises when a stream or its connection is over; none of it is documented."""

logger = logging.getLogger(__name__)


class StockConnection:
    """A `connection.Connection`."""

    round_trip_s: float | None = None
    idle_since_s: float | None

    def __init__(self, muxed: IMuxedConn, peer_id: PeerId, path: ConnectionPath) -> None:
        self.peer_id = peer_id
        self.path = path
        self._muxed = muxed
        self._accepted: deque[StockStream] = deque()
        self._changed = trio.Condition()
        self._nursery: trio.Nursery | None = None
        self.broke_protocol = False
        """Stock yamux does not tell."""
        self._is_closed = False
        self._open: set[StockStream] = set()
        self.idle_since_s = trio.current_time()

    @property
    def is_closed(self) -> bool:
        return self._is_closed or self._muxed.is_closed

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._accept)
                await self._muxed.start()
                nursery.cancel_scope.cancel()
        except Exception as error:  # a border: stock yamux documents none of what it raises
            logger.debug("yamux connection to %s failed", self.peer_id, exc_info=error)
        finally:
            with trio.move_on_after(1, shield=True):
                await self.close()

    async def _accept(self) -> None:
        while True:
            try:
                muxed_stream = await self._muxed.accept_stream()
            except STREAM_ERRORS:
                break
            self._accepted.append(self._start(muxed_stream))
            async with self._changed:
                self._changed.notify_all()
        await self._mark_closed()

    def _start(self, muxed_stream: IMuxedStream) -> "StockStream":
        if self._nursery is None:
            raise ConnectionLost(f"the connection to {self.peer_id} does not run", self.peer_id)
        stream = StockStream(muxed_stream, self.peer_id, self._nursery, self._note_end)
        self._open.add(stream)
        self.idle_since_s = None
        self._nursery.start_soon(stream.read_ahead)
        return stream

    def _note_end(self, stream: "StockStream") -> None:
        if stream not in self._open:
            return
        self._open.remove(stream)
        if not self._open:
            self.idle_since_s = trio.current_time()

    async def _mark_closed(self) -> None:
        self._is_closed = True
        async with self._changed:
            self._changed.notify_all()

    async def open_stream(self) -> "StockStream":
        with trio.CancelScope(shield=True):
            try:
                muxed_stream = await self._muxed.open_stream()
            except STREAM_ERRORS as error:
                raise ConnectionLost(f"cannot open a stream to {self.peer_id}: {error}", self.peer_id) from error
        return self._start(muxed_stream)

    async def accept_stream(self) -> "StockStream | None":
        async with self._changed:
            while not self._accepted:
                if self._is_closed:
                    return None
                await self._changed.wait()
        return self._accepted.popleft()

    async def close(self) -> None:
        try:
            await self._muxed.close()
        except STREAM_ERRORS as error:
            logger.debug("closing the yamux connection to %s: %s", self.peer_id, error)
        await self._mark_closed()


class StockStream:
    """A `connection.ConnectionStream`."""

    def __init__(
        self,
        muxed: IMuxedStream,
        peer_id: PeerId,
        nursery: trio.Nursery,
        on_end: Callable[["StockStream"], None],
    ) -> None:
        self.protocol = ProtocolId("")
        self.peer_id = peer_id
        self._muxed = muxed
        self._nursery = nursery
        self._on_end = on_end
        """Called when the peer has closed its side, or the stream is lost or reset; more than once maybe."""
        self._buffer = bytearray()
        self._peer_closed = False
        self._error: str | None = None
        self._changed = trio.Event()

    async def read_ahead(self) -> None:
        """Reads until the end, but never more than `READ_AHEAD_BYTES` beyond what was taken."""
        try:
            while self._error is None:
                while len(self._buffer) >= READ_AHEAD_BYTES and self._error is None:
                    await self._wait()
                data = await self._muxed.read(READ_AHEAD_BYTES)
                if not data:
                    break
                self._buffer += data
                self._wake()
            self._peer_closed = True
        except MuxedStreamEOF:
            self._peer_closed = True
        except STREAM_ERRORS as error:
            self._error = self._error or str(error) or type(error).__name__
        finally:
            if not self._peer_closed:
                self._error = self._error or "the connection ended"
            self._wake()
            self._on_end(self)

    async def read(self, max_bytes: int = 1 << 20) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._buffer:
            if self._error is not None:
                raise self._lost()
            if self._peer_closed:
                return b""
            await self._wait()
        data = bytes(self._buffer[:max_bytes])
        del self._buffer[:max_bytes]
        self._wake()
        return data

    async def write(self, *buffers: Buffer) -> None:
        await trio.lowlevel.checkpoint()
        if self._error is not None:
            raise self._lost()
        with trio.CancelScope(shield=True):
            try:
                await self._muxed.write(b"".join(buffers))
            except STREAM_ERRORS as error:
                self._error = str(error) or type(error).__name__
                self._wake()
                raise self._lost() from error

    async def close_write(self) -> None:
        with trio.CancelScope(shield=True):
            try:
                await self._muxed.close()
            except STREAM_ERRORS as error:
                raise self._lost() from error

    async def close(self) -> None:
        await self.close_write()

    def reset(self) -> None:
        if self._error is None:
            self._error = "it was reset here"
            self._buffer.clear()
            with contextlib.suppress(RuntimeError):  # where the connection has ended, there is nobody to tell
                self._nursery.start_soon(self._reset)
            self._wake()
            self._on_end(self)

    async def _reset(self) -> None:
        with trio.CancelScope(shield=True):
            try:
                await self._muxed.reset()
            except STREAM_ERRORS as error:
                logger.debug("resetting a yamux stream to %s: %s", self.peer_id, error)

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"stream {self.protocol} to {self.peer_id} is lost: {self._error}", self.peer_id)

    def _wake(self) -> None:
        self._changed.set()

    async def _wait(self) -> None:
        if self._changed.is_set():
            self._changed = trio.Event()
        await self._changed.wait()
