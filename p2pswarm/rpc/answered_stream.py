"""`AnsweredStream`: a stream on which requests come and answers go, and whether one is in work.

Knows no request. `rpc/served_stream.py` and `rpc/served_session.py` say what is answered.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

import trio

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import PeerId
from p2pswarm.rpc.error_replies import reply_to
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import ErrorCode, ErrorReply, Message

GOODBYE_TIMEOUT_S = 2.0
"""For the peer to take a last word."""

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class AnsweredStream:
    """The server's end of `framed`."""

    def __init__(self, framed: FramedStream, limits: RpcLimits, errors: Counter[ErrorCode]) -> None:
        """`errors` counts what went wrong by what the peer is told of it."""
        self.peer_id: PeerId = framed.peer_id
        self._framed = framed
        self._limits = limits
        self._errors = errors
        self._is_sending = False
        self._resting_since: float | None = trio.current_time()

    @property
    def is_busy(self) -> bool:
        """Whether a request is being worked on or answered."""
        return self._resting_since is None

    @property
    def is_sending(self) -> bool:
        """Whether an answer is on its way, or was broken off in the middle."""
        return self._is_sending

    @property
    def rest_s(self) -> float:
        """How long the stream has been waiting for a request; 0 while busy."""
        return 0.0 if self._resting_since is None else trio.current_time() - self._resting_since

    async def receive(self, timeout_s: float) -> Message | None:
        """The next request; the one before it is dealt with. Raises as `FramedStream.receive` does."""
        self._resting_since = trio.current_time()
        message = await self._framed.receive(timeout_s)
        self._resting_since = None
        return message

    async def receive_in_work(self) -> Message | None:
        """What the peer says while its last request is in work (hold that one). Raises as `receive` does."""
        return await self._framed.receive()

    def holding_last(self) -> AbstractContextManager[None]:
        """Within, what was received last stays charged, whatever is received besides."""
        return self.holding(self._framed.charged_bytes)

    @contextlib.contextmanager
    def holding(self, num_bytes: int) -> Iterator[None]:
        """Within, so many bytes are charged besides. Raises `ServerBusy` where that is too much."""
        self._framed.hold(num_bytes)
        try:
            yield
        finally:
            self._framed.hold(-num_bytes)

    async def send(self, message: Message) -> None:
        if isinstance(message, ErrorReply):
            self._errors[message.code] += 1
        self._is_sending = True
        await self._framed.send(message, self._limits.send_timeout_s)
        self._is_sending = False

    async def attempt(self, call: Callable[[], Awaitable[Answer]]) -> Answer | ErrorReply:
        """What the call gives in time, or what to tell the peer instead."""
        try:
            with trio.move_on_after(self._limits.call_timeout_s):
                return await call()
            raise trio.TooSlowError
        except Exception as error:  # isolation border: one request's failure is answered, logged, and over
            reply = reply_to(error)
            if reply.code is ErrorCode.INTERNAL:
                logger.error("a request of %s failed", self.peer_id, exc_info=error)
            return reply

    async def say_goodbye(self, reply: ErrorReply) -> None:
        """The last word, where the peer is not in the middle of an answer."""
        if self._is_sending:
            self._framed.reset()
            return
        self._errors[reply.code] += 1
        self._framed.release()
        with trio.move_on_after(GOODBYE_TIMEOUT_S), contextlib.suppress(ConnectionLost):
            await self._framed.send(reply)
            await self._framed.close_write()

    def release(self) -> None:
        """Lets go of all that has come."""
        self._framed.release()
