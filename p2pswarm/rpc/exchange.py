"""One request and the message that comes back, with a deadline that names the peer."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from p2pswarm.core.errors import ConnectionLost, DeadlineExceeded
from p2pswarm.core.ids import PeerId
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import Message


@contextmanager
def deadline(timeout_s: float, peer_id: PeerId, what: str) -> Iterator[None]:
    """Within, `timeout_s` may pass; then `DeadlineExceeded` says that the peer did not do `what` (an infinitive)."""
    try:
        with trio.fail_after(timeout_s):
            yield
    except trio.TooSlowError as error:
        raise too_late(timeout_s, peer_id, what) from error


def too_late(timeout_s: float, peer_id: PeerId, what: str) -> DeadlineExceeded:
    """The error that says so."""
    return DeadlineExceeded(f"{peer_id} did not {what} within {timeout_s:.3g} s", peer_id)


async def exchange(framed: FramedStream, request: Message) -> Message:
    """What the peer answers. One that has left already may have said why: then that is its answer.

    Raises `ConnectionLost`, `ProtocolViolation`. The stream is reset if this raises or is cancelled.
    """
    try:
        answer = await send_or_hear_why_not(framed, request) or await receive_answer(framed)
    except BaseException:
        framed.reset()
        raise
    return answer


async def send_or_hear_why_not(framed: FramedStream, request: Message) -> Message | None:
    """None when the request is on its way, else what the peer said before it left. Raises `ConnectionLost`."""
    try:
        await framed.send(request)
    except ConnectionLost as lost:
        # Does not wait: a stream that cannot be written has all it will have.
        try:
            return await receive_answer(framed)
        except ConnectionLost:
            raise lost from None
    return None


async def receive_answer(framed: FramedStream) -> Message:
    """The next message. Raises `ConnectionLost` where there is none, `ProtocolViolation`."""
    answer = await framed.receive()
    if answer is None:
        raise ConnectionLost(f"{framed.peer_id} closed the stream without an answer", framed.peer_id)
    return answer
