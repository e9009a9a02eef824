"""`ServedStream`: the server's end of one stream, from its first message to its last.

Calls come one after the other, each with one answer; an `OpenSession` that succeeds turns the stream into the
session's, for steps only. A message that cannot be understood or is refused gets an `ErrorReply` and the stream goes
on; after bytes that are no frame it cannot, and ends. Whatever ends a stream, its session is closed once, and nothing
remains.
"""

import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio

from p2pswarm.core.errors import (
    BadRequest,
    ConnectionLost,
    DeadlineExceeded,
    MalformedMessage,
    ProtocolViolation,
    ServerBusy,
)
from p2pswarm.rpc.error_replies import SURVIVABLE_CODES, Draining, reply_to
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.rpc.service import RpcService, SessionService
from p2pswarm.rpc.usage import Usage
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import (
    ErrorCode,
    ErrorReply,
    Forward,
    InfoRequest,
    Message,
    OpenSession,
    SessionOpened,
    Step,
    StepReply,
)

CLOSE_SESSION_TIMEOUT_S = 5.0
GOODBYE_TIMEOUT_S = 2.0
"""For the peer to take a last word."""

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class ServedStream:
    """Serves `framed` until either side has enough of it. `run` once."""

    def __init__(self, framed: FramedStream, service: RpcService, usage: Usage, limits: RpcLimits) -> None:
        self.is_draining = False
        """Set from outside: nothing new is begun from now on."""
        self.in_session = False
        self._framed = framed
        self._peer_id = framed.peer_id
        self._service = service
        self._usage = usage
        self._limits = limits
        self._scope = trio.CancelScope()
        self._last_step_id = -1
        self._is_sending = False
        self._resting_since: float | None = trio.current_time()

    @property
    def is_busy(self) -> bool:
        """Whether a request is being worked on or answered."""
        return self._resting_since is None

    @property
    def rest_s(self) -> float:
        """How long the stream has been waiting for a message; 0 while busy."""
        return 0.0 if self._resting_since is None else trio.current_time() - self._resting_since

    def hand_back(self) -> None:
        """Ends the stream, in the middle of a request too; a peer that waits or has a session is told so."""
        self._scope.cancel()

    async def run(self) -> None:
        """Returns when the peer has closed its side or was told that it is over.

        Raises `ConnectionLost`, or `DeadlineExceeded` for a peer that neither sends nor reads.
        """
        try:
            with self._scope:
                await self._serve_calls()
            if self._scope.cancelled_caught and (self.in_session or self.is_busy):
                code = ErrorCode.SESSION_LOST if self.in_session else ErrorCode.DRAINING
                await self._say_goodbye(ErrorReply(code, "the server is about to stop"))
        except DeadlineExceeded as error:
            if not self.in_session:
                raise
            await self._say_goodbye(ErrorReply.shortened(ErrorCode.SESSION_LOST, str(error)))
        except (ProtocolViolation, ServerBusy) as error:
            logger.debug("a stream of %s ends: %s", self._peer_id, error)
            await self._say_goodbye(reply_to(error))
        finally:
            self._framed.release()

    async def refuse(self, error: ServerBusy) -> None:
        """Instead of `run`: tells the peer that there is no room for its stream."""
        await self._say_goodbye(reply_to(error))

    async def _serve_calls(self) -> None:
        timeout_s = self._limits.first_message_timeout_s
        while await self._serve_next_call(timeout_s):
            timeout_s = self._limits.idle_stream_timeout_s

    async def _serve_next_call(self, timeout_s: float) -> bool:
        """Whether more may follow. (A function, so that no request lies about while the next one is waited for.)"""
        try:
            message = await self._receive(timeout_s)
            match message:
                case None:
                    return False
                case OpenSession():
                    return not await self._serve_session(message)
                case _:
                    await self._send(await self._attempt(partial(self._call, message)))
        except MalformedMessage as error:
            await self._send(reply_to(error))
        return True

    async def _call(self, message: Message) -> Message:
        match message:
            case InfoRequest():
                return await self._service.info(self._peer_id)
            case Forward():
                self._check_not_draining()
                return await self._service.forward(self._peer_id, message)
            case _:
                raise BadRequest(f"{type(message).__name__} is not a call", self._peer_id)

    async def _serve_session(self, request: OpenSession) -> bool:
        """The whole session; False where it was refused, and the stream may be used for something else."""
        with contextlib.ExitStack() as held:
            session = await self._attempt(partial(self._open, request, held))
            if isinstance(session, ErrorReply):
                await self._send(session)
                return False
            self.in_session = True
            try:
                await self._send(SessionOpened(request.session_id))
                while await self._serve_next_step(session):
                    pass
            finally:
                await self._close(session)
        return True

    async def _open(self, request: OpenSession, held: contextlib.ExitStack) -> SessionService:
        self._check_not_draining()
        held.enter_context(self._usage.session(self._peer_id))
        return await self._service.open_session(self._peer_id, request)

    async def _serve_next_step(self, session: SessionService) -> bool:
        """Whether more may follow."""
        try:
            message = await self._receive(self._limits.idle_session_timeout_s)
        except MalformedMessage as error:
            await self._send(reply_to(error))
            return True
        if message is None:
            return False
        answer = await self._attempt(partial(self._step, session, message))
        await self._send(answer)
        return not isinstance(answer, ErrorReply) or answer.code in SURVIVABLE_CODES

    async def _step(self, session: SessionService, message: Message) -> StepReply:
        if not isinstance(message, Step):
            raise BadRequest(f"a session takes steps, not {type(message).__name__}", self._peer_id)
        if message.step_id <= self._last_step_id:
            raise BadRequest(f"step ids rise: {message.step_id} came after {self._last_step_id}", self._peer_id)
        self._last_step_id = message.step_id
        return await session.step(message)

    async def _close(self, session: SessionService) -> None:
        with trio.move_on_after(CLOSE_SESSION_TIMEOUT_S, shield=True):
            try:
                await session.close()
            except Exception:
                # The border between a service's failures and everybody else: the stream is over in any case.
                logger.exception("closing a session of %s failed", self._peer_id)

    async def _attempt(self, call: Callable[[], Awaitable[Answer]]) -> Answer | ErrorReply:
        """What the call gives in time, or what to tell the peer instead."""
        try:
            with trio.fail_after(self._limits.call_timeout_s):
                return await call()
        except Exception as error:  # isolation border: one request's failure is answered, logged, and over
            reply = reply_to(error)
            if reply.code is ErrorCode.INTERNAL:
                logger.error("a request of %s failed", self._peer_id, exc_info=error)
            return reply

    async def _receive(self, timeout_s: float) -> Message | None:
        self._resting_since = trio.current_time()
        message = await self._framed.receive(timeout_s)
        self._resting_since = None
        return message

    async def _send(self, message: Message) -> None:
        self._is_sending = True
        await self._framed.send(message, self._limits.send_timeout_s)
        self._is_sending = False

    async def _say_goodbye(self, reply: ErrorReply) -> None:
        """The last word, where the peer is not in the middle of an answer."""
        if self._is_sending:
            self._framed.reset()
            return
        self._framed.release()
        with trio.move_on_after(GOODBYE_TIMEOUT_S), contextlib.suppress(ConnectionLost):
            await self._framed.send(reply)
            await self._framed.close_write()

    def _check_not_draining(self) -> None:
        if self.is_draining:
            raise Draining("the server is about to stop", self._peer_id)
