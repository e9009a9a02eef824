"""One end of a simulated stream: bytes, windows, half-close and reset, with no idea of nodes or time.

`testing/memory_connection.py` carries its segments; the real counterpart is `net/mux_stream.py`.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import trio

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.network import Buffer

WINDOW_BYTES = 1 << 20
"""What a writer may have under way before the reader takes some: between the real windows' 256 KiB and 16 MiB."""
SEGMENT_BYTES = 64 * 1024
"""Largest piece sent at once, so that a long write shares a slow link with other streams."""
HEADER_BYTES = 52
"""TCP/IP, noise and muxer headers of a small message."""


class Carrier(Protocol):
    """What a stream asks of its connection."""

    @property
    def peer_id(self) -> PeerId: ...

    def transmit(self, size_bytes: int, arrive: Callable[[], None]) -> None:
        """Calls `arrive` at the other end when the segment gets there."""
        ...

    def forget(self, stream: "MemoryStream") -> None: ...


class MemoryStream:
    """A `net.network.Stream`; `twin` is the other end, touched only by way of `Carrier.transmit`."""

    def __init__(self, carrier: Carrier, protocol: ProtocolId) -> None:
        self._carrier = carrier
        self._protocol = protocol
        self.twin: MemoryStream = self
        self._received: deque[bytes] = deque()
        self._taken_bytes = 0
        self._send_window_bytes = WINDOW_BYTES
        self._peer_closed = False
        self._write_closed = False
        self._answer: bool | None = None
        self._error: str | None = None
        self._changed = trio.Event()

    @property
    def peer_id(self) -> PeerId:
        return self._carrier.peer_id

    @property
    def protocol(self) -> ProtocolId:
        return self._protocol

    async def wait_answer(self) -> bool:
        """Whether the peer speaks our protocol; raises `ConnectionLost`."""
        while self._answer is None:
            self._raise_if_broken()
            await self._wait()
        return self._answer

    def answer(self, is_spoken: bool) -> None:
        """The peer says whether it speaks our protocol."""
        self._answer = is_spoken
        self._wake()

    async def read(self, max_bytes: int = 1 << 20) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._received:
            if self._peer_closed:
                return b""
            self._raise_if_broken()
            await self._wait()
        return self._take(max_bytes)

    def _take(self, max_bytes: int) -> bytes:
        pieces = []
        left = max_bytes
        while self._received and left:
            piece = self._received.popleft()
            if len(piece) > left:
                self._received.appendleft(piece[left:])
                piece = piece[:left]
            left -= len(piece)
            pieces.append(piece)
        data = b"".join(pieces)
        self._taken_bytes += len(data)
        if self._taken_bytes >= WINDOW_BYTES // 2 and not self._peer_closed:
            self._carrier.transmit(HEADER_BYTES, partial(self.twin.widen, self._taken_bytes))
            self._taken_bytes = 0
        return data

    async def write(self, *buffers: Buffer) -> None:
        await trio.lowlevel.checkpoint()
        data = b"".join(buffers)
        start = 0
        while True:
            self._raise_if_broken()
            if self._write_closed:
                raise ConnectionLost(f"stream to {self.peer_id} is closed for writing", self.peer_id)
            if start >= len(data):
                return
            end = min(len(data), start + SEGMENT_BYTES, start + self._send_window_bytes)
            if end == start:
                await self._wait()
                continue
            self._send_window_bytes -= end - start
            self._carrier.transmit(HEADER_BYTES + end - start, partial(self.twin.receive, data[start:end]))
            start = end

    async def close_write(self) -> None:
        await trio.lowlevel.checkpoint()
        self._close_write()

    def _close_write(self) -> None:
        if self._write_closed or self._error is not None:
            return
        self._write_closed = True
        self._carrier.transmit(HEADER_BYTES, self.twin.end)
        self._wake()
        if self._peer_closed:
            self._carrier.forget(self)

    async def close(self) -> None:
        """Closes our side and gives up reading; what was written arrives, a peer that still writes is stopped."""
        await trio.lowlevel.checkpoint()
        self._close_write()
        self.reset()

    def reset(self) -> None:
        if self._error is None and not (self._write_closed and self._peer_closed):
            self._carrier.transmit(HEADER_BYTES, partial(self.twin.break_off, "the peer reset it"))
        self._received.clear()
        self._peer_closed = False
        self.break_off("reset here")

    def break_off(self, why: str) -> None:
        """The stream is over; what came before stays readable."""
        if self._error is None:
            self._error = why
            self._wake()
            self._carrier.forget(self)

    def receive(self, data: bytes) -> None:
        """A segment of the peer's arrives."""
        if self._error is None and not self._peer_closed:
            self._received.append(data)
            self._wake()

    def end(self) -> None:
        """The peer has closed its side."""
        self._peer_closed = True
        self._wake()
        if self._write_closed:
            self._carrier.forget(self)

    def widen(self, size_bytes: int) -> None:
        """The peer has taken this much out of its buffer."""
        self._send_window_bytes += size_bytes
        self._wake()

    def _raise_if_broken(self) -> None:
        if self._error is not None:
            raise ConnectionLost(f"stream {self._protocol} to {self.peer_id} is lost: {self._error}", self.peer_id)

    def _wake(self) -> None:
        self._changed.set()

    async def _wait(self) -> None:
        if self._changed.is_set():
            self._changed = trio.Event()
        await self._changed.wait()
