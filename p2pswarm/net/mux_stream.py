"""One stream of the muxer: its two windows, its buffer, and how far each side has closed.

It knows nothing of frames: `StreamOwner` (`net/mux_connection.py`) sends for it and tells it what came in. Every
method is safe under cancellation: waiting changes nothing, and nothing waits in the middle of a change.
"""

from collections import deque
from typing import Protocol

import trio

from p2pswarm.core.errors import ConnectionLost, ProtocolViolation
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.mux_frames import INITIAL_WINDOW_BYTES
from p2pswarm.net.network import Buffer

MAX_FRAME_BYTES = 65519 - 12
"""A data frame and its header fill exactly one noise message."""
SMALL_PIECE_BYTES = 4096
"""Pieces below this are gathered in the buffer: one object per byte would hold 50 times what the window allows."""
MAX_PEER_WINDOW_BYTES = 1 << 31
"""A peer that grants more is playing games with our arithmetic."""


class StreamOwner(Protocol):
    """What a stream asks of its connection."""

    peer_id: PeerId

    def has_room(self) -> bool:
        """Whether the writer takes more data now."""
        ...

    async def wait_room(self) -> None: ...

    def wake_waiting_for_room(self) -> None: ...

    def send_data(self, stream: "MuxStream", data: bytes | memoryview) -> None: ...

    def send_fin(self, stream: "MuxStream") -> None: ...

    def send_reset(self, stream: "MuxStream") -> None: ...

    def consumed(self, stream: "MuxStream", num_bytes: int) -> None:
        """The reader took this much out of the buffer."""
        ...

    def finished(self, stream: "MuxStream") -> None:
        """Both sides are closed, or it was reset: nothing more will come or go."""
        ...


class MuxStream:
    """A `net.network.Stream`."""

    def __init__(self, owner: StreamOwner, stream_id: int, receive_window_bytes: int) -> None:
        self.stream_id = stream_id
        self.protocol = ProtocolId("")
        self.receive_window_bytes = receive_window_bytes
        """Size of the window; what of it the peer may still use is `receive_credit_bytes`."""
        self.receive_credit_bytes = receive_window_bytes
        self.unacknowledged_bytes = 0
        """Taken out by the reader, not yet granted again."""
        self.last_update_s = trio.current_time()
        self.buffered_bytes = 0
        self.is_taken_up = False
        """Whether somebody on this side knows of it."""
        self._owner = owner
        self._pieces: deque[Buffer] = deque()
        self._send_credit_bytes = INITIAL_WINDOW_BYTES
        self._peer_closed = False
        self._write_closed = False
        self._waits_for_room = False
        self._error: str | None = None
        self._readable = trio.Event()
        self._writable = trio.Event()

    @property
    def peer_id(self) -> PeerId:
        return self._owner.peer_id

    @property
    def is_finished(self) -> bool:
        return self._error is not None or (self._peer_closed and self._write_closed)

    async def read(self, max_bytes: int = 1 << 20) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        has_waited = False
        while not self._pieces:
            if self._peer_closed:
                break
            self._raise_if_broken()
            if self._readable.is_set():
                self._readable = trio.Event()
            await self._readable.wait()
            has_waited = True
        if not has_waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return self._take(max_bytes)

    def _take(self, max_bytes: int) -> bytes:
        if not self._pieces:
            return b""
        taken = []
        left = max_bytes
        while self._pieces and left:
            piece = self._pieces.popleft()
            if len(piece) > left:
                self._pieces.appendleft(piece[left:])
                piece = piece[:left]
            left -= len(piece)
            taken.append(piece)
        data = bytes(taken[0]) if len(taken) == 1 else b"".join(taken)
        self.buffered_bytes -= len(data)
        self._owner.consumed(self, len(data))
        return data

    async def write(self, *buffers: Buffer) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._raise_if_not_writable()
        views = [memoryview(buffer) for buffer in buffers]
        if sum(view.nbytes for view in views) <= MAX_FRAME_BYTES:
            await self._write_all(memoryview(b"".join(views)))
        else:
            for view in views:
                await self._write_all(view)
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _write_all(self, view: memoryview) -> None:
        # What the caller may change after we return is copied; `bytes` cannot change.
        is_constant = isinstance(view.obj, bytes)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        start = 0
        while start < len(view):
            self._raise_if_not_writable()
            if not self._send_credit_bytes:
                if self._writable.is_set():
                    self._writable = trio.Event()
                await self._writable.wait()
            elif not self._owner.has_room():
                self._waits_for_room = True
                await self._owner.wait_room()
                self._waits_for_room = False
            else:
                end = min(len(view), start + self._send_credit_bytes, start + MAX_FRAME_BYTES)
                self._send_credit_bytes -= end - start
                piece = view[start:end]
                self._owner.send_data(self, piece if is_constant else bytes(piece))
                start = end

    def write_now(self, data: bytes | bytearray) -> int:
        """Sends what goes without waiting, one frame at most; how many bytes that was.

        Not while `write` is at it; `data` must never change again. Raises `ConnectionLost`.
        """
        self._raise_if_not_writable()
        if not self._owner.has_room():
            return 0
        num_bytes = min(len(data), self._send_credit_bytes, MAX_FRAME_BYTES)
        if num_bytes:
            self._send_credit_bytes -= num_bytes
            self._owner.send_data(self, memoryview(data)[:num_bytes])
        return num_bytes

    async def close_write(self) -> None:
        await trio.lowlevel.checkpoint()
        self._close_write()

    def _close_write(self) -> None:
        if self._write_closed or self._error is not None:
            return
        self._write_closed = True
        self._writable.set()
        self._owner.send_fin(self)
        if self._peer_closed:
            self._owner.finished(self)

    async def close(self) -> None:
        """Closes our side and gives up reading; what was written arrives, a peer that still writes is stopped."""
        await trio.lowlevel.checkpoint()
        self._close_write()
        self.reset()

    def reset(self) -> None:
        if not self.is_finished:
            self._owner.send_reset(self)
        self._pieces.clear()
        self._peer_closed = False
        self.break_off("it was reset here")

    def break_off(self, why: str) -> None:
        """It is over: whoever waits gets `ConnectionLost`. What came before stays readable."""
        if self._error is not None:
            return
        self._error = why
        self._readable.set()
        self._writable.set()
        if self._waits_for_room:
            self._owner.wake_waiting_for_room()
        self._owner.finished(self)

    def receive(self, payload: bytes | memoryview) -> None:
        """Takes in data of the peer's. Raises `ProtocolViolation` when there is more than we granted."""
        if len(payload) > self.receive_credit_bytes:
            raise ProtocolViolation(
                f"{self.peer_id} sent {len(payload)} bytes on stream {self.stream_id}, "
                f"{self.receive_credit_bytes} were granted",
                self.peer_id,
            )
        if not payload:
            return
        if self._peer_closed:
            raise ProtocolViolation(f"{self.peer_id} sent data on stream {self.stream_id} after its end", self.peer_id)
        self.receive_credit_bytes -= len(payload)
        self.buffered_bytes += len(payload)
        last = self._pieces[-1] if self._pieces else None
        if len(payload) >= SMALL_PIECE_BYTES or last is None:
            self._pieces.append(payload)
        elif isinstance(last, bytearray) and len(last) < MAX_FRAME_BYTES:
            last += payload
        else:
            self._pieces.append(bytearray(payload))
        self._readable.set()

    def peer_closes(self) -> None:
        """The peer will send no more."""
        self._peer_closed = True
        self._readable.set()
        if self._write_closed:
            self._owner.finished(self)

    def widen(self, num_bytes: int) -> None:
        """The peer lets us send this much more. Raises `ProtocolViolation` when it grants absurdly much."""
        self._send_credit_bytes += num_bytes
        if self._send_credit_bytes > MAX_PEER_WINDOW_BYTES:
            raise ProtocolViolation(f"{self.peer_id} grants more than 2 GiB on stream {self.stream_id}", self.peer_id)
        self._writable.set()

    def _raise_if_broken(self) -> None:
        if self._error is not None:
            raise ConnectionLost(f"stream {self.protocol} to {self.peer_id} is lost: {self._error}", self.peer_id)

    def _raise_if_not_writable(self) -> None:
        self._raise_if_broken()
        if self._write_closed:
            raise ConnectionLost(f"stream {self.protocol} to {self.peer_id} is closed for writing", self.peer_id)
