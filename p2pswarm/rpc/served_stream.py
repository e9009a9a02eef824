"""`ServedStream`: the server's end of one stream, from its first message to its last.

Calls come one after the other, each with one answer; an `OpenSession` that succeeds turns the stream into the
session's, for steps only (`rpc/served_session.py`). A message that cannot be understood or is refused gets an
`ErrorReply` and the stream goes on; after bytes that are no frame it cannot, and ends. Whatever ends a stream, its
session is closed once, and nothing remains.
"""

import contextlib
import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial

import trio

from p2pswarm.core.errors import BadRequest, DeadlineExceeded, MalformedMessage, ProtocolViolation, ServerBusy
from p2pswarm.core.ids import SessionId
from p2pswarm.rpc.answered_stream import GOODBYE_TIMEOUT_S, AnsweredStream
from p2pswarm.rpc.error_replies import Draining, reply_to
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.rpc.push_exchange import PushExchange, PushSlot
from p2pswarm.rpc.pusher import Pusher, open_session_pushes
from p2pswarm.rpc.served_session import ServedSession
from p2pswarm.rpc.service import RpcService, SessionService
from p2pswarm.rpc.speed_tests import SpeedTestGrants
from p2pswarm.rpc.usage import Usage
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import (
    Backward,
    ErrorCode,
    ErrorReply,
    Forward,
    InfoRequest,
    Message,
    OpenSession,
    Push,
    SessionOpened,
    SpeedTest,
)

CLOSE_SESSION_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """What all streams of a server share."""

    service: RpcService
    limits: RpcLimits
    usage: Usage
    pushes: PushExchange
    pusher: Pusher
    speed_tests: SpeedTestGrants
    errors: Counter[ErrorCode]
    """What peers were told that went wrong, since the start."""


class ServedStream:
    """Serves `framed` until either side has enough of it. `run` once."""

    def __init__(self, framed: FramedStream, served: Served) -> None:
        self.is_draining = False
        """Set from outside: nothing new is begun from now on."""
        self.in_session = False
        self._stream = AnsweredStream(framed, served.limits, served.errors)
        self._peer_id = framed.peer_id
        self._served = served
        self._scope = trio.CancelScope()

    @property
    def is_busy(self) -> bool:
        """Whether a request is being worked on or answered."""
        return self._stream.is_busy

    @property
    def rest_s(self) -> float:
        """How long the stream has been waiting for a request; 0 while busy."""
        return self._stream.rest_s

    def hand_back(self) -> None:
        """Ends the stream, in the middle of a request too; a peer that waits or has a session is told so.

        An answer that is on its way goes out first, if the peer takes it soon: nothing can be said in the middle of it.
        """
        patience_s = GOODBYE_TIMEOUT_S if self._stream.is_sending else 0.0
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + patience_s)

    async def run(self) -> None:
        """Returns when the peer has closed its side or was told that it is over.

        Raises `ConnectionLost`; `DeadlineExceeded` for a peer that neither sends nor reads; `ProtocolViolation` for one
        whose bytes are no messages, so that whoever runs the connection counts it.
        """
        try:
            with self._scope:
                await self._serve_calls()
            if self._scope.cancelled_caught and (self.in_session or self.is_busy):
                code = ErrorCode.SESSION_LOST if self.in_session else ErrorCode.DRAINING
                await self._stream.say_goodbye(ErrorReply(code, "the server is about to stop or to move"))
        except DeadlineExceeded as error:
            if not self.in_session:
                raise
            await self._stream.say_goodbye(ErrorReply.shortened(ErrorCode.SESSION_LOST, str(error)))
        except (ProtocolViolation, ServerBusy) as error:
            logger.debug("a stream of %s ends: %s", self._peer_id, error)
            await self._stream.say_goodbye(reply_to(error))
            if isinstance(error, ProtocolViolation):
                raise
        finally:
            self._stream.release()

    async def refuse(self, error: ServerBusy) -> None:
        """Instead of `run`: tells the peer that there is no room for its stream."""
        await self._stream.say_goodbye(reply_to(error))

    async def _serve_calls(self) -> None:
        timeout_s = self._served.limits.first_message_timeout_s
        while await self._serve_next_call(timeout_s):
            timeout_s = self._served.limits.idle_stream_timeout_s

    async def _serve_next_call(self, timeout_s: float) -> bool:
        """Whether more may follow. (A function, so that no request lies about while the next one is waited for.)"""
        try:
            message = await self._stream.receive(timeout_s)
            match message:
                case None:
                    return False
                case OpenSession():
                    session_id = message.session_id
                    with contextlib.ExitStack() as held:
                        opened = await self._stream.attempt(partial(self._open, message, held))
                        del message  # its tuning is charged here no longer: what the session keeps, the service counts
                        return not await self._serve_session(session_id, opened)
                case _:
                    await self._stream.send(await self._stream.attempt(partial(self._call, message)))
        except MalformedMessage as error:
            await self._stream.send(reply_to(error))
        return True

    async def _call(self, message: Message) -> Message:
        match message:
            case InfoRequest():
                return await self._served.service.info(self._peer_id)
            case Forward():
                self._check_not_draining()
                return await self._served.service.forward(self._peer_id, message)
            case Backward():
                self._check_not_draining()
                return await self._served.service.backward(self._peer_id, message)
            case Push():
                return await self._served.pushes.deliver(message, self._peer_id)
            case SpeedTest():
                return self._served.speed_tests.answer(message, self._peer_id, trio.current_time())
            case _:
                raise BadRequest(f"{type(message).__name__} is not a call", self._peer_id)

    async def _serve_session(self, session_id: SessionId, opened: tuple[SessionService, PushSlot] | ErrorReply) -> bool:
        """The whole session; False where it was refused, and the stream may be used for something else."""
        if isinstance(opened, ErrorReply):
            await self._stream.send(opened)
            return False
        session, slot = opened
        self.in_session = True
        try:
            await self._stream.send(SessionOpened(session_id))
            async with open_session_pushes(self._served.pusher, self._peer_id) as pushes:
                await ServedSession(self._stream, session, slot, pushes, self._served.limits).run()
        finally:
            await self._close(session)
        return True

    async def _open(self, request: OpenSession, held: contextlib.ExitStack) -> tuple[SessionService, PushSlot]:
        self._check_not_draining()
        held.enter_context(self._served.usage.session(self._peer_id))
        slot = held.enter_context(self._served.pushes.session(request.session_id, self._peer_id))
        return await self._served.service.open_session(self._peer_id, request), slot

    async def _close(self, session: SessionService) -> None:
        with trio.move_on_after(CLOSE_SESSION_TIMEOUT_S, shield=True):
            try:
                await session.close()
            except Exception:
                # The border between a service's failures and everybody else: the stream is over in any case.
                logger.exception("closing a session of %s failed", self._peer_id)

    def _check_not_draining(self) -> None:
        if self.is_draining:
            raise Draining("the server is about to stop or to move", self._peer_id)
