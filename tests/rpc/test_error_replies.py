"""Errors over the wire: what the server raises, what the client is told, what it raises in turn."""

import pytest
import trio

from p2pswarm.core.errors import (
    BadRequest,
    CodecError,
    ConnectionLost,
    MalformedMessage,
    RequestRefused,
    ServerBusy,
    ServerFailed,
    SessionLost,
    UnknownMessage,
    UnsupportedVersion,
)
from p2pswarm.core.ids import PeerId
from p2pswarm.rpc.error_replies import Draining, error_from, reply_to
from p2pswarm.wire.messages import ErrorCode, ErrorReply

PEER = PeerId("12D3KooWpeer")


@pytest.mark.parametrize(
    ("raised", "code", "seen"),
    [
        (BadRequest("why"), ErrorCode.BAD_REQUEST, RequestRefused),
        (CodecError("why"), ErrorCode.BAD_REQUEST, RequestRefused),
        (MalformedMessage("why"), ErrorCode.BAD_REQUEST, RequestRefused),
        (UnknownMessage("why"), ErrorCode.UNKNOWN_MESSAGE, RequestRefused),
        (UnsupportedVersion("why"), ErrorCode.UNSUPPORTED_VERSION, RequestRefused),
        (ServerBusy("why"), ErrorCode.BUSY, ServerBusy),
        (Draining("why"), ErrorCode.DRAINING, ServerBusy),
        (SessionLost("why"), ErrorCode.SESSION_LOST, SessionLost),
    ],
)
def test_what_concerns_the_request_is_told(raised: Exception, code: ErrorCode, seen: type[Exception]) -> None:
    reply = reply_to(raised)
    assert reply == ErrorReply(code, "why")
    error = error_from(reply, PEER)
    assert type(error) is seen
    assert "12D3KooWpeer" in str(error)
    assert "why" in str(error)


@pytest.mark.parametrize("raised", [RuntimeError("secret"), trio.TooSlowError("secret"), ConnectionLost("secret")])
def test_what_concerns_the_server_is_not_told(raised: Exception) -> None:
    reply = reply_to(raised)
    assert reply.code is ErrorCode.INTERNAL
    assert "secret" not in reply.message
    assert type(error_from(reply, PEER)) is ServerFailed


def test_a_session_ended_in_good_order_is_nobodys_fault() -> None:
    assert type(error_from(ErrorReply(ErrorCode.SESSION_LOST, "idle"), PEER)) is SessionLost


def test_long_and_odd_texts_are_tamed() -> None:
    assert len(reply_to(BadRequest("x" * 5000)).message) == 1024
    assert "\x1b" not in str(error_from(ErrorReply(ErrorCode.BUSY, "\x1b[2J\nboo"), PEER))
