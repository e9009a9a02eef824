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
        raise DeadlineExceeded(f"{peer_id} did not {what} within {timeout_s:g} s", peer_id) from error


async def exchange(framed: FramedStream, request: Message) -> Message:
    """What the peer answers. One that has left already may have said why: then that is its answer.

    Raises `ConnectionLost`, `ProtocolViolation`. The stream is reset if this raises or is cancelled.
    """
    try:
        try:
            await framed.send(request)
        except ConnectionLost as lost:
            answer = await _last_word(framed, lost)
        else:
            answer = await framed.receive()
        if answer is None:
            raise ConnectionLost(f"{framed.peer_id} closed the stream without an answer", framed.peer_id)
    except BaseException:
        framed.reset()
        raise
    return answer


async def _last_word(framed: FramedStream, lost: ConnectionLost) -> Message | None:
    """What came before the stream was lost. Does not wait: a stream that cannot be written has all it will have."""
    try:
        return await framed.receive()
    except ConnectionLost:
        raise lost from None
