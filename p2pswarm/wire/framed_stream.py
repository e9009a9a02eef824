"""`FramedStream`: whole messages over a stream of bytes.

Knows no protocol: who sends what when is for `rpc/`. Works over anything shaped as `net.network.Stream`.
"""

import math
from typing import Protocol

import trio

from p2pswarm.core.errors import DeadlineExceeded, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.wire.frames import DEFAULT_LIMITS, Buffer, Frame, FrameDecoder, WireLimits, num_bytes
from p2pswarm.wire.messages import PROTOCOL_VERSION, Message
from p2pswarm.wire.serialization import decode_message, encode_message, sender_version

READ_BYTES = 256 << 10
"""Also what a peer may have us hold, for each stream, beyond the message that is being worked on."""


SLOWEST_BYTES_PER_S = 16 << 10
"""A path slower than this is as good as none; a peer that sends or reads a message in crumbs loses its stream."""


class ByteStream(Protocol):
    """The part of `net.network.Stream` that messages need."""

    @property
    def peer_id(self) -> PeerId: ...

    async def read(self, max_bytes: int = READ_BYTES) -> bytes: ...

    async def write(self, *buffers: Buffer) -> None: ...

    async def close_write(self) -> None: ...

    def reset(self) -> None: ...


class ReceiveBudget(Protocol):
    """Who bounds what unfinished and unanswered messages of one peer take."""

    def change(self, num_bytes: int) -> None:
        """Takes so many bytes more, or gives them back. Raises a `SwarmingError` where that is too much."""
        ...


class FramedStream:
    """Sends and receives messages on `stream`, one sender and one receiver at a time.

    A cancelled `receive` has lost nothing and may be repeated; after a cancelled `send` the stream can only be reset.
    """

    def __init__(
        self, stream: ByteStream, limits: WireLimits = DEFAULT_LIMITS, budget: ReceiveBudget | None = None
    ) -> None:
        self._stream = stream
        self._limits = limits
        self._decoder = FrameDecoder(limits, stream.peer_id)
        self._budget = budget
        self._charged_bytes = 0
        self._version = PROTOCOL_VERSION

    @property
    def peer_id(self) -> PeerId:
        return self._stream.peer_id

    @property
    def version(self) -> int:
        """The newest protocol version that both sides speak, as far as the peer has said."""
        return self._version

    async def send(self, message: Message, timeout_s: float = math.inf) -> None:
        """Returns when the message is queued. Raises `ConnectionLost`.

        A peer that does not take it within `timeout_s`, and the time that a slow path needs, is `DeadlineExceeded`.
        """
        buffers = encode_message(message)
        if timeout_s == math.inf:
            await self._stream.write(*buffers)
            return
        path_s = sum(map(num_bytes, buffers)) / SLOWEST_BYTES_PER_S
        with trio.move_on_after(timeout_s + path_s) as scope:
            await self._stream.write(*buffers)
        if scope.cancelled_caught:
            raise DeadlineExceeded(f"{self.peer_id} took no answer for {timeout_s:g} s", self.peer_id)

    async def receive(self, timeout_s: float = math.inf) -> Message | None:
        """The next message, None when the peer has closed its side between two messages.

        A peer from which none comes within `timeout_s`, and the time that a slow path needs for what has come of it, is
        `DeadlineExceeded`.

        The message before it counts as dealt with. Raises `ConnectionLost`; `MalformedMessage`, after which the
        stream can go on; any other `ProtocolViolation`, after which it cannot.
        """
        frame = await self._receive_frame(timeout_s)
        if frame is None:
            return None
        self._charge(frame.body.nbytes)
        self._version = min(PROTOCOL_VERSION, sender_version(frame, self.peer_id))
        return decode_message(frame, self._limits, self.peer_id)

    async def _receive_frame(self, timeout_s: float) -> Frame | None:
        if self._decoder.in_frame:
            await trio.lowlevel.checkpoint()  # so that who sends many messages at once does not keep all others waiting
            frame = self._decoder.next_frame()
            if frame is not None:
                return frame
        if timeout_s == math.inf:
            return await self._read_frame(None)
        with trio.move_on_after(timeout_s) as scope:
            return await self._read_frame(scope)
        raise DeadlineExceeded(f"no message came from {self.peer_id} for {timeout_s:g} s", self.peer_id)

    async def _read_frame(self, scope: trio.CancelScope | None) -> Frame | None:
        """The frame once it has come whole; what has come of it so far moves the deadline of `scope`."""
        while True:
            self._charge(self._decoder.held_bytes)
            data = await self._stream.read(READ_BYTES)
            if not data:
                self._check_end()
                return None
            self._decoder.feed(data)
            frame = self._decoder.next_frame()
            if frame is not None:
                return frame
            if scope is not None:
                scope.deadline += len(data) / SLOWEST_BYTES_PER_S

    async def close_write(self) -> None:
        await self._stream.close_write()

    def reset(self) -> None:
        """Ends the stream at once. Safe to call at any time, twice too."""
        self._stream.reset()
        self.release()

    def release(self) -> None:
        """Lets go of what has come and its budget; no more will be received."""
        self._decoder = FrameDecoder(self._limits, self.peer_id)
        self._charge(0)

    @property
    def charged_bytes(self) -> int:
        """What the message that came last, or has come of the next one, takes of the budget."""
        return self._charged_bytes

    def hold(self, num_bytes: int) -> None:
        """Charges so much besides, for what is still worked on, or (below zero) gives it back."""
        if self._budget is not None:
            self._budget.change(num_bytes)

    def _charge(self, num_bytes: int) -> None:
        if self._budget is not None and num_bytes != self._charged_bytes:
            self._budget.change(num_bytes - self._charged_bytes)
            self._charged_bytes = num_bytes

    def _check_end(self) -> None:
        if self._decoder.in_frame:
            raise ProtocolViolation(
                f"{self.peer_id} ended its side in the middle of a frame, after {self._decoder.held_bytes} bytes of it",
                self.peer_id,
            )
