"""`RemoteSession`: the client's end of a session's stream. Every answer is held against its step.

Values are not looked at (that needs torch): whoever decodes the hidden states checks that they are finite.
"""

import trio

from p2pswarm.core.errors import BadAnswer, ConnectionLost, ProtocolViolation, SessionClosed
from p2pswarm.core.ids import PeerId
from p2pswarm.rpc.error_replies import SURVIVABLE_CODES, error_from
from p2pswarm.rpc.exchange import receive_answer, send_or_hear_why_not, too_late
from p2pswarm.rpc.limits import DEFAULT_RPC_LIMITS
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import (
    PUSH_VERSION,
    ErrorReply,
    Message,
    OpenSession,
    PushedStep,
    Step,
    StepReply,
)


class RemoteSession:
    """An open session at `peer_id`; made by `RpcClient.open_session`, one step at a time.

    A step is sent and its one answer received, `step` does both. After a `PushedStep` the whole `Step` may be sent too,
    once: the server runs and answers whichever hidden states it gets first. A step that is given up is followed by one
    with a higher id; what may still be answered to it is passed over.

    `RequestRefused` and `ServerBusy` mean that the step changed nothing, and the session goes on with a new step id. It
    is over after any other error, and after a cancelled call: `ServerFailed`, `SessionLost`, `ConnectionLost`,
    `DeadlineExceeded`, `BadAnswer`, `ProtocolViolation`; then `SessionClosed`.
    """

    def __init__(self, framed: FramedStream, request: OpenSession) -> None:
        self.request = request
        self._framed = framed
        self._unanswered: set[int] = set()
        """Ids of the steps that were sent."""
        self._is_in_use = False
        self._is_over = False

    @property
    def peer_id(self) -> PeerId:
        return self._framed.peer_id

    @property
    def is_over(self) -> bool:
        """Whether the session was lost or closed: no step can work any more."""
        return self._is_over

    @property
    def can_push(self) -> bool:
        """Whether the server knows `PushedStep`, and pushes where a step asks for it."""
        return self._framed.version >= PUSH_VERSION

    async def step(self, step: Step, timeout_s: float) -> StepReply:
        """The server's answer, which fits the step."""
        ends_s = trio.current_time() + timeout_s
        await self.send(step, timeout_s)
        return await self.receive(step, ends_s - trio.current_time())

    async def send(self, step: Step | PushedStep, timeout_s: float = DEFAULT_RPC_LIMITS.send_timeout_s) -> None:
        """Returns when the step is on its way, which waits for the server's window where the step is long."""
        self._check_usable()
        self._unanswered.add(step.step_id)
        self._is_in_use = True
        try:
            with trio.move_on_after(timeout_s) as scope:
                farewell = await send_or_hear_why_not(self._framed, step)
            if scope.cancelled_caught:
                raise too_late(timeout_s, self.peer_id, "take a step")
        except BaseException:
            self.close()
            raise
        finally:
            self._is_in_use = False
        if farewell is not None:
            self.close()
            self._check(step, farewell)
            raise ConnectionLost(f"{self.peer_id} left after its answer", self.peer_id)

    async def receive(self, step: Step | PushedStep, timeout_s: float) -> StepReply:
        """The answer to the step that was sent."""
        reply = await self.reply_within(step, timeout_s)
        if reply is None:
            self.close()
            raise too_late(timeout_s, self.peer_id, "answer a step")
        return reply

    async def reply_within(self, step: Step | PushedStep, timeout_s: float) -> StepReply | None:
        """The answer, None if it has not come yet: then the session goes on, and it may be asked for again."""
        self._check_usable()
        self._is_in_use = True
        try:
            with trio.move_on_after(timeout_s) as scope:
                while self._is_late(answer := await receive_answer(self._framed), step):
                    pass
        except BaseException:
            self.close()
            raise
        finally:
            self._is_in_use = False
        if scope.cancelled_caught:
            return None
        return self._check(step, answer)

    def close(self) -> None:
        """Ends the session at the server too, without waiting."""
        self._is_over = True
        self._framed.reset()

    def _check_usable(self) -> None:
        if self._is_over:
            raise SessionClosed(f"the session at {self.peer_id} is over")
        if self._is_in_use:
            raise trio.BusyResourceError("another task is in the middle of a step of this session")

    def _is_late(self, answer: Message, step: Step | PushedStep) -> bool:
        """Whether it answers a step that was sent before this one and given up."""
        step_id = answer.step_id if isinstance(answer, StepReply | ErrorReply) else None
        if step_id not in self._unanswered:
            return False
        self._unanswered.remove(step_id)
        return step_id < step.step_id

    def _check(self, step: Step | PushedStep, answer: Message) -> StepReply:
        match answer:
            case StepReply():
                complaint = complaint_about(answer, step, self.request)
                if complaint is None:
                    return answer
                self.close()
                raise BadAnswer(f"{self.peer_id} answered {complaint}", self.peer_id)
            case ErrorReply():
                if answer.code not in SURVIVABLE_CODES:
                    self.close()
                raise error_from(answer, self.peer_id)
            case _:
                self.close()
                raise ProtocolViolation(f"{self.peer_id} answered a step by {type(answer).__name__}", self.peer_id)


def complaint_about(reply: StepReply, step: Step | PushedStep, request: OpenSession) -> str | None:
    """What of the reply does not fit the step, None if all does. The hidden size and dtype of what was pushed are not
    known here."""
    got = reply.hidden_states
    if reply.step_id != step.step_id:
        return f"step {reply.step_id}, not {step.step_id}"
    if reply.position != step.position + step.num_tokens:
        return f"position {reply.position} to {step.num_tokens} tokens from {step.position} on"
    if got.codec is not request.codec:
        return f"by codec {got.codec.value}, not {request.codec.value}"
    if isinstance(step, PushedStep):
        if got.shape[:2] != (request.batch_size, step.num_tokens):
            return f"hidden states of shape {list(got.shape)} to {request.batch_size} rows of {step.num_tokens} tokens"
        return None
    sent = step.hidden_states
    if got.shape != sent.shape:
        return f"hidden states of shape {list(got.shape)} to ones of {list(sent.shape)}"
    if got.dtype != sent.dtype:
        return f"hidden states of {got.dtype} to ones of {sent.dtype}"
    return None
