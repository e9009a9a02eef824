"""`ServedSession`: the server's end of a session, step by step, each step id with one answer.

The hidden states of a `PushedStep` come by push, from the server before, or in the client's own copy of the step,
whichever is first; what comes of the other later is ignored. While they are waited for, the stream is read: its end and
nonsense on it are noticed at once. A newer step says that the client has given the awaited one up.
"""

import logging
from dataclasses import replace
from functools import partial

import trio

from p2pswarm.core.errors import ConfigError, MalformedMessage, ServerBusy
from p2pswarm.rpc.answered_stream import AnsweredStream
from p2pswarm.rpc.error_replies import SURVIVABLE_CODES, reply_to
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.rpc.push_exchange import PushSlot
from p2pswarm.rpc.pusher import SessionPushes
from p2pswarm.rpc.service import SessionService
from p2pswarm.wire.frames import num_bytes
from p2pswarm.wire.messages import ErrorCode, ErrorReply, Message, Push, PushedStep, Step, StepReply, WireTensor

logger = logging.getLogger(__name__)


class ServedSession:
    """Takes the steps of `session` off `stream`, what is pushed to it out of `slot`, and pushes on. `run` once."""

    def __init__(
        self,
        stream: AnsweredStream,
        session: SessionService,
        slot: PushSlot,
        pushes: SessionPushes,
        limits: RpcLimits,
    ) -> None:
        self._stream = stream
        self._session = session
        self._slot = slot
        self._pushes = pushes
        self._limits = limits
        self._last_step_id = -1
        self._late_copy_id: int | None = None
        """The pushed step of which the client's own copy may still come, to be ignored then."""
        self._next: Step | PushedStep | None = None
        """What came while the step before it waited for its hidden states."""

    async def run(self) -> None:
        """Returns when the client has closed its side, or a failed step has ended the session."""
        while await self._serve_next():
            pass

    async def _serve_next(self) -> bool:
        """Whether more may follow. (A function, so that no step lies about while the next one is waited for.)"""
        try:
            message = self._take_next() or await self._stream.receive(self._patience_s)
        except MalformedMessage as error:
            await self._stream.send(reply_to(error))
            return True
        match message:
            case None:
                return False
            case Step() if message.step_id == self._late_copy_id:
                self._late_copy_id = None
                return True
            case Step() | PushedStep() if message.step_id > self._last_step_id:
                return await self._serve_step(message)
            case _:
                await self._refuse(message)
                return True

    @property
    def _patience_s(self) -> float:
        """For the next step."""
        has_begun = self._last_step_id >= 0
        return self._limits.idle_session_timeout_s if has_begun else self._limits.first_step_timeout_s

    def _take_next(self) -> Message | None:
        message, self._next = self._next, None
        return message

    async def _refuse(self, message: Message) -> None:
        """Answers what is not the next step."""
        if isinstance(message, Step | PushedStep):
            complaint = f"step ids rise: {message.step_id} came after {self._last_step_id}"
        else:
            complaint = f"a session takes steps, not {type(message).__name__}"
        await self._stream.send(ErrorReply(ErrorCode.BAD_REQUEST, complaint))

    async def _serve_step(self, step: Step | PushedStep) -> bool:
        self._last_step_id = step.step_id
        self._slot.settle(step.step_id - 1)
        answer = await (self._run(step) if isinstance(step, Step) else self._run_pushed(step))
        self._slot.settle(step.step_id)
        match answer:
            case None:
                return False
            case StepReply():
                await self._stream.send(answer)
                return True
            case ErrorReply():
                await self._stream.send(replace(answer, step_id=step.step_id))
                return answer.code in SURVIVABLE_CODES

    async def _run(self, step: Step) -> StepReply | ErrorReply:
        """The answer; the output is on its way to the next server too, if that was asked for."""
        answer = await self._stream.attempt(partial(self._session.step, step))
        if step.push_to is not None and isinstance(answer, StepReply):
            self._pushes.start(step.push_to, Push(step.push_to.session_id, step.step_id, answer.hidden_states))
        return answer

    async def _run_pushed(self, step: PushedStep) -> StepReply | ErrorReply | None:
        """The answer once the hidden states have come, one way or the other; None at the stream's end."""
        self._late_copy_id = step.step_id
        with self._stream.holding_last():
            return await self._run_first_to_come(step, trio.current_time() + self._limits.call_timeout_s)

    async def _run_first_to_come(self, step: PushedStep, ends_s: float) -> StepReply | ErrorReply | None:
        while True:
            try:
                came = await self._push_or_message(step.step_id, ends_s)
            except MalformedMessage as error:
                await self._stream.send(reply_to(error))
                continue
            except trio.TooSlowError:
                return ErrorReply(ErrorCode.BAD_REQUEST, f"the hidden states of step {step.step_id} did not come")
            match came:
                case None:
                    return None
                case Push():
                    answer = await self._run_push(step, came.hidden_states)
                    if answer is not None:
                        return answer
                case Step() if came.step_id == step.step_id:
                    self._late_copy_id = None
                    return await self._run(came)
                case Step() | PushedStep() if came.step_id > step.step_id:
                    self._next = came
                    return ErrorReply(
                        ErrorCode.BAD_REQUEST, f"step {came.step_id} came before the hidden states of {step.step_id}"
                    )
                case _:
                    await self._refuse(came)

    async def _push_or_message(self, step_id: int, ends_s: float) -> Message | None:
        """The push for the step, or what comes on the stream: whichever is first. Raises `trio.TooSlowError`.

        No task is needed for that: a receive that is cancelled has lost nothing.
        """
        push = self._slot.take(step_id)
        if push is not None:
            return push
        with trio.CancelScope(deadline=ends_s) as scope, self._slot.asking(step_id, scope.cancel):
            return await self._stream.receive_in_work()
        push = self._slot.take(step_id)
        if push is None:
            raise trio.TooSlowError
        return push

    async def _run_push(self, pushed: PushedStep, hidden_states: WireTensor) -> StepReply | ErrorReply | None:
        """The answer; None where the hidden states do not fit: whoever pushed them was wrong, not the client."""
        try:
            with self._stream.holding(num_bytes(hidden_states.data)):
                answer = await self._run(pushed.with_hidden_states(hidden_states))
        except (ConfigError, ServerBusy) as error:
            logger.debug("a push to step %d of %s is dropped: %s", pushed.step_id, self._stream.peer_id, error)
            return None
        if isinstance(answer, StepReply):
            return replace(answer, from_push=True)
        if answer.code is ErrorCode.BAD_REQUEST:
            logger.debug("a push to step %d of %s is dropped: %s", pushed.step_id, self._stream.peer_id, answer.message)
            return None
        return answer
