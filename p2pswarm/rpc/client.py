"""`RpcClient`: calls to other nodes, each with a deadline; idle streams are kept and used again.

A call that is cancelled, fails or is too late resets its stream: what may still come on it belongs to nobody. Errors
say what to do next (`core/errors.py`); nothing is retried here, but for a kept stream that its server had closed
meanwhile.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

from p2pswarm.core.errors import BadAnswer, ConnectionLost, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.net.network import Network
from p2pswarm.rpc.error_replies import error_from
from p2pswarm.rpc.exchange import deadline, exchange
from p2pswarm.rpc.limits import DEFAULT_RPC_LIMITS, RPC_PROTOCOL, RpcLimits
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.rpc.speed_tests import meaningless
from p2pswarm.rpc.stream_pool import StreamPool
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import (
    MIN_PROTOCOL_VERSION,
    TUNING_VERSION,
    Backward,
    BackwardReply,
    ErrorReply,
    Forward,
    ForwardReply,
    InfoReply,
    InfoRequest,
    Message,
    OpenSession,
    Push,
    PushReply,
    SessionOpened,
    SpeedTest,
    SpeedTestReply,
)
from p2pswarm.wire.tensors import Codec, WireTensor
from p2pswarm.wire.tuning import same_parts

Reply = TypeVar("Reply", InfoReply, ForwardReply, BackwardReply, PushReply, SessionOpened, SpeedTestReply)


class RpcClient:
    """Calls over `network`, from any number of tasks at once. `close` it in the end."""

    def __init__(self, network: Network, limits: RpcLimits = DEFAULT_RPC_LIMITS) -> None:
        self._network = network
        self._limits = limits
        self._pool = StreamPool(limits)

    def close(self) -> None:
        """Closes the idle streams."""
        self._pool.close()

    async def info(self, peer_id: PeerId, timeout_s: float) -> InfoReply:
        """What the peer serves. Raises as `forward` does."""
        framed, reply = await self._call(peer_id, InfoRequest(), InfoReply, timeout_s)
        self._pool.put(framed)
        if reply.info.peer_id != peer_id:
            raise BadAnswer(f"{peer_id} says that it is {reply.info.peer_id}", peer_id)
        return reply

    async def forward(self, peer_id: PeerId, request: Forward, timeout_s: float) -> ForwardReply:
        """The batch after the peer's blocks, in the shape, dtype and codec asked for.

        Raises `RequestRefused`, `RemoteError` (`ServerBusy`, `ServerFailed`, `BadAnswer`, `ProtocolViolation`),
        `NetworkError` (`PeerUnreachable`, `ConnectionLost`, `DeadlineExceeded`).
        """
        framed, reply = await self._call(peer_id, request, ForwardReply, timeout_s)
        self._pool.put(framed)
        _check_like(reply.hidden_states, request.hidden_states, request.codec, peer_id)
        return reply

    async def backward(self, peer_id: PeerId, request: Backward, timeout_s: float) -> BackwardReply:
        """The gradients of the batch, and of each part of its tuning, in their shapes and dtypes; those of the batch by
        the codec asked for. Raises as `forward` does."""
        framed, reply = await self._call(peer_id, request, BackwardReply, timeout_s)
        self._pool.put(framed)
        _check_like(reply.grad_inputs, request.hidden_states, request.codec, peer_id)
        if not same_parts(reply.grad_tuning, request.tuning):
            raise BadAnswer(f"{peer_id} answered gradients of other parts than the tuning has, or shapes", peer_id)
        return reply

    async def push(self, peer_id: PeerId, push: Push, timeout_s: float) -> None:
        """Returns when the peer has taken the push. Raises as `forward` does."""
        framed, _ = await self._call(peer_id, push, PushReply, timeout_s)
        self._pool.put(framed)

    async def speed_test(self, peer_id: PeerId, sent_bytes: int, answer_bytes: int, timeout_s: float) -> None:
        """Returns when so many bytes have gone there and so many have come back. Raises as `forward` does."""
        request = SpeedTest(meaningless(sent_bytes), answer_bytes)
        framed, reply = await self._call(peer_id, request, SpeedTestReply, timeout_s)
        self._pool.put(framed)
        if reply.data.shape != (answer_bytes,):
            raise BadAnswer(f"{peer_id} sent {reply.data.shape[0]} bytes, wanted {answer_bytes}", peer_id)

    def has_idle_stream(self, peer_id: PeerId) -> bool:
        """Whether the next call to the peer finds an open stream."""
        return self._pool.has(peer_id)

    @contextlib.asynccontextmanager
    async def open_session(
        self, peer_id: PeerId, request: OpenSession, timeout_s: float
    ) -> AsyncIterator[RemoteSession]:
        """A session at the peer, for as long as the block lasts. Raises as `forward` does."""
        framed, reply = await self._call(peer_id, request, SessionOpened, timeout_s)
        session = RemoteSession(framed, request)
        try:
            if reply.session_id != request.session_id:
                raise BadAnswer(f"{peer_id} opened session {reply.session_id}, not {request.session_id}", peer_id)
            yield session
        finally:
            session.close()

    async def _call(
        self, peer_id: PeerId, request: Message, reply_type: type[Reply], timeout_s: float
    ) -> tuple[FramedStream, Reply]:
        """The answer, and the stream it came on, which is now the caller's."""
        with deadline(timeout_s, peer_id, f"answer {type(request).__name__}"):
            kept = self._pool.take(peer_id)
            if kept is not None:
                with contextlib.suppress(ConnectionLost):
                    return kept, await _ask(kept, request, reply_type)
            framed = FramedStream(await self._network.open_stream(peer_id, RPC_PROTOCOL), self._limits.wire)
            return framed, await _ask(framed, request, reply_type)


async def _ask(framed: FramedStream, request: Message, reply_type: type[Reply]) -> Reply:
    """The answer that was asked for; the stream is reset after anything else."""
    answer = await exchange(framed, request)
    if framed.version < _version_needed(request):
        framed.reset()
        raise BadAnswer(
            f"{framed.peer_id} speaks protocol versions up to {framed.version} and cannot train or apply what a client "
            f"brings along, which takes {TUNING_VERSION}: use another server, or update that one",
            framed.peer_id,
        )
    if isinstance(answer, reply_type):
        return answer
    framed.reset()
    if isinstance(answer, ErrorReply):
        raise error_from(answer, framed.peer_id)
    raise ProtocolViolation(
        f"{framed.peer_id} answered {type(request).__name__} by {type(answer).__name__}", framed.peer_id
    )


def _version_needed(request: Message) -> int:
    """The first protocol version that understands the request. Older servers would pass a tuning over in silence."""
    match request:
        case Backward():
            return TUNING_VERSION
        case Forward() | OpenSession() if request.tuning is not None:
            return TUNING_VERSION
        case _:
            return MIN_PROTOCOL_VERSION


def _check_like(got: WireTensor, sent: WireTensor, codec: Codec, peer_id: PeerId) -> None:
    """Raises `BadAnswer` where the answer's tensor is not as the one that was sent, by the codec asked for."""
    if (got.shape, got.dtype, got.codec) != (sent.shape, sent.dtype, codec):
        raise BadAnswer(
            f"{peer_id} answered {got.dtype} of shape {list(got.shape)} by codec {got.codec.value}, wanted "
            f"{sent.dtype} of shape {list(sent.shape)} by codec {codec.value}",
            peer_id,
        )
