"""Runs the handler of a stream that a peer opened, and keeps what goes wrong in it from harming anything else."""

import logging
from typing import Protocol

import trio

from p2pswarm.core.errors import MalformedMessage, ProtocolViolation, SwarmingError
from p2pswarm.net.network import Stream, StreamHandler

logger = logging.getLogger(__name__)


class ServedStream(Stream, Protocol):
    """A stream that can also be ended politely."""

    async def close(self) -> None:
        """Closes our side and throws away what still comes in; what we wrote arrives."""
        ...


async def run_handler(handler: StreamHandler, stream: ServedStream) -> bool:
    """Whether the peer kept to the protocol, as far as the handler's exception says.

    Closes the stream when the handler returns, resets it when it raises; only cancellation goes further up.
    """
    kept_protocol = True
    try:
        await handler(stream)
        await stream.close()
    except SwarmingError as error:
        logger.debug("stream %s of %s ended: %s", stream.protocol, stream.peer_id, error)
        kept_protocol = not _is_violation(error, stream)
    except BaseExceptionGroup as group:
        kept_protocol = group.subgroup(lambda error: _is_violation(error, stream)) is None
        _report(stream, group.split((SwarmingError, trio.Cancelled))[1])
        cancelled = group.split(trio.Cancelled)[0]
        if cancelled is not None:
            raise cancelled from None
    except Exception as error:  # noqa: BLE001 - isolation border: one stream's bug must not take the node down
        _report(stream, error)
    finally:
        stream.reset()
    return kept_protocol


def _is_violation(error: BaseException, stream: Stream) -> bool:
    """By the peer at the other end. (A message that is not as agreed may come from another version of ours.)"""
    if not isinstance(error, ProtocolViolation) or isinstance(error, MalformedMessage):
        return False
    return error.peer_id == stream.peer_id


def _report(stream: Stream, error: BaseException | None) -> None:
    if error is not None:
        logger.error("handler of %s failed, stream to %s reset", stream.protocol, stream.peer_id, exc_info=error)
