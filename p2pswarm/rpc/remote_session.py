"""`RemoteSession`: the client's end of a session's stream. Every answer is held against its step.

Values are not looked at (that needs torch): whoever decodes the hidden states checks that they are finite.
"""

import trio

from p2pswarm.core.errors import BadAnswer, ProtocolViolation, SessionClosed
from p2pswarm.core.ids import PeerId
from p2pswarm.rpc.error_replies import SURVIVABLE_CODES, error_from
from p2pswarm.rpc.exchange import deadline, exchange
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import Codec, ErrorReply, Message, OpenSession, Step, StepReply


class RemoteSession:
    """An open session at `peer_id`; made by `RpcClient.open_session`, one step at a time."""

    def __init__(self, framed: FramedStream, request: OpenSession) -> None:
        self.request = request
        self._framed = framed
        self._is_stepping = False
        self._is_over = False

    @property
    def peer_id(self) -> PeerId:
        return self._framed.peer_id

    @property
    def is_over(self) -> bool:
        """Whether the session was lost or closed: no step can work any more."""
        return self._is_over

    async def step(self, step: Step, timeout_s: float) -> StepReply:
        """The server's answer, which fits the step.

        `RequestRefused` and `ServerBusy` mean that the step changed nothing, and the session goes on. It is over
        after any other error, and after a cancelled step: `ServerFailed`, `ConnectionLost`, `DeadlineExceeded`,
        `BadAnswer`, `ProtocolViolation`; then `SessionClosed`.
        """
        if self._is_over:
            raise SessionClosed(f"the session at {self.peer_id} is over")
        if self._is_stepping:
            raise trio.BusyResourceError("another task is in the middle of a step of this session")
        self._is_stepping = True
        try:
            with deadline(timeout_s, self.peer_id, "answer a step"):
                answer = await exchange(self._framed, step)
        except BaseException:
            self.close()
            raise
        finally:
            self._is_stepping = False
        return self._checked(step, answer)

    def close(self) -> None:
        """Ends the session at the server too, without waiting."""
        self._is_over = True
        self._framed.reset()

    def _checked(self, step: Step, answer: Message) -> StepReply:
        match answer:
            case StepReply():
                complaint = complaint_about(answer, step, self.request.codec)
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


def complaint_about(reply: StepReply, step: Step, codec: Codec) -> str | None:
    """What of the reply does not fit the step, None if all does."""
    got, sent = reply.hidden_states, step.hidden_states
    if reply.step_id != step.step_id:
        return f"step {reply.step_id}, not {step.step_id}"
    if reply.position != step.position + step.num_tokens:
        return f"position {reply.position} to {step.num_tokens} tokens from {step.position} on"
    if got.shape != sent.shape:
        return f"hidden states of shape {list(got.shape)} to ones of {list(sent.shape)}"
    if got.dtype != sent.dtype:
        return f"hidden states of {got.dtype} to ones of {sent.dtype}"
    if got.codec is not codec:
        return f"by codec {got.codec.value}, not {codec.value}"
    return None
