"""Errors <-> `ErrorReply`: what a server tells a client, and what the client makes of it."""

from typing import assert_never

import trio

from p2pswarm.core.errors import (
    BadRequest,
    CodecError,
    ProtocolViolation,
    RequestRefused,
    ServerBusy,
    ServerFailed,
    SessionLost,
    SwarmingError,
    UnknownMessage,
    UnsupportedVersion,
)
from p2pswarm.core.ids import PeerId
from p2pswarm.wire.messages import ErrorCode, ErrorReply

SURVIVABLE_CODES = frozenset({ErrorCode.BAD_REQUEST, ErrorCode.UNKNOWN_MESSAGE, ErrorCode.BUSY})
"""In a session: the step was refused and changed nothing, the next may come. After the others the session is over."""


class Draining(ServerBusy):
    """Seen by a server: it is about to stop and begins nothing new."""


def reply_to(error: Exception) -> ErrorReply:
    """What the peer is told. Errors that are not about its request stay our own business: no details."""
    match error:
        case UnknownMessage():
            code = ErrorCode.UNKNOWN_MESSAGE
        case UnsupportedVersion():
            code = ErrorCode.UNSUPPORTED_VERSION
        case BadRequest() | CodecError() | ProtocolViolation():
            code = ErrorCode.BAD_REQUEST
        case Draining():
            code = ErrorCode.DRAINING
        case ServerBusy():
            code = ErrorCode.BUSY
        case SessionLost():
            code = ErrorCode.SESSION_LOST
        case trio.TooSlowError():
            return ErrorReply(ErrorCode.INTERNAL, "the server did not manage in time")
        case _:
            return ErrorReply(ErrorCode.INTERNAL, "the server failed; its log says why")
    return ErrorReply.shortened(code, str(error))


def error_from(reply: ErrorReply, peer_id: PeerId) -> SwarmingError:
    """What the client raises. The text is a stranger's: only its printable characters are shown."""
    text = "".join(character if character.isprintable() else "?" for character in reply.message)
    match reply.code:
        case ErrorCode.BAD_REQUEST | ErrorCode.UNKNOWN_MESSAGE | ErrorCode.UNSUPPORTED_VERSION:
            return RequestRefused(f"{peer_id} refused: {text}", peer_id)
        case ErrorCode.BUSY | ErrorCode.DRAINING:
            return ServerBusy(f"{peer_id} has no room: {text}", peer_id)
        case ErrorCode.SESSION_LOST:
            return SessionLost(f"{peer_id} ended the session: {text}", peer_id)
        case ErrorCode.INTERNAL:
            return ServerFailed(f"{peer_id} failed: {text}", peer_id)
        case _:
            assert_never(reply.code)
