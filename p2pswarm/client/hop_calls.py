"""One call to one server: rows through its blocks, or their gradients back, with the answer checked.

Retries nothing (`client/walk.py` does). A server that is late is asked whether it is alive, again and again: one that
hangs costs seconds, one that is only slow gets the whole deadline.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.link import at_hop, decode_finite
from p2pswarm.client.model_servers import ModelServers, dtype_of
from p2pswarm.client.single_error import single_error
from p2pswarm.client.step_times import declared_step_s
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import BadAnswer, DeadlineExceeded, NetworkError, PeerUnreachable, RemoteError, RequestRefused
from p2pswarm.core.ids import PeerId
from p2pswarm.routing.route import Hop
from p2pswarm.rpc.client import RpcClient
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import Backward, BackwardReply, Forward, ForwardReply, WireTensor
from p2pswarm.wire.tuning import WireTuning

BACKWARD_COST = 3
"""A server runs its blocks once more, and then back, which takes twice as long (2001.08361, section 2.1)."""

Reply = TypeVar("Reply", ForwardReply, BackwardReply)


@dataclass(frozen=True, slots=True, eq=False)
class CallTerms:
    """What is the same for some rows at every server that they come to."""

    attention_mask: WireTensor | None
    position_ids: WireTensor | None
    adapter: str | None
    """The id of one that servers announce."""
    tuning: Tuning | None


class HopCalls:
    """Raises `RemoteError`, `NetworkError` or `RequestRefused` naming the server and its blocks."""

    def __init__(self, servers: ModelServers, rpc: RpcClient, config: ClientConfig) -> None:
        self._servers = servers
        self._rpc = rpc
        self._config = config

    async def forward(self, hop: Hop, hidden_states: torch.Tensor, terms: CallTerms) -> torch.Tensor:
        """`hidden_states` [rows, tokens, hidden] after the hop's blocks, in the dtype of its server."""
        codec = self._config.codec
        try:
            sent = self._as_sent(hop, hidden_states)
            request = Forward(
                self._servers.facts.model_id,
                hop.span,
                encode_tensor(sent, codec),
                terms.attention_mask,
                terms.position_ids,
                codec,
                terms.adapter,
                _part(terms, hop),
            )
            reply = await self._answer(hop, partial(self._rpc.forward, hop.peer_id, request), sent, cost=1)
            return decode_finite(reply.hidden_states, hop)
        except (RemoteError, NetworkError, RequestRefused) as error:
            raise at_hop(error, hop) from error

    async def backward(
        self, hop: Hop, hidden_states: torch.Tensor, grad_outputs: torch.Tensor, terms: CallTerms
    ) -> tuple[torch.Tensor, WireTuning | None]:
        """The loss's gradient for what entered the hop's blocks, and for the tuning of these, by that for what came
        out."""
        codec = self._config.codec
        try:
            sent = self._as_sent(hop, hidden_states)
            request = Backward(
                self._servers.facts.model_id,
                hop.span,
                encode_tensor(sent, codec),
                encode_tensor(grad_outputs.to(sent.dtype), codec),
                terms.attention_mask,
                terms.position_ids,
                codec,
                terms.adapter,
                _part(terms, hop),
            )
            ask = partial(self._rpc.backward, hop.peer_id, request)
            reply = await self._answer(hop, ask, sent, cost=BACKWARD_COST)
            _check_finite(reply.grad_tuning, hop.peer_id)
            return decode_finite(reply.grad_inputs, hop), reply.grad_tuning
        except (RemoteError, NetworkError, RequestRefused) as error:
            raise at_hop(error, hop) from error

    def _as_sent(self, hop: Hop, hidden_states: torch.Tensor) -> torch.Tensor:
        """In what the server computes in. Raises `PeerUnreachable` for one that is not announced any more."""
        server = self._servers.known.get(hop.peer_id)
        if server is None:
            raise PeerUnreachable("the server has left the swarm", hop.peer_id)
        return hidden_states.to(dtype_of(server))

    async def _answer(
        self, hop: Hop, ask: Callable[[float], Awaitable[Reply]], sent: torch.Tensor, *, cost: int
    ) -> Reply:
        """What the server answers. Raises `DeadlineExceeded` as soon as it is late and does not say that it lives."""
        num_tokens, asked_at_s = cost * sent.shape[0] * sent.shape[1], trio.current_time()
        times = self._servers.step_times(hop, in_sessions=False)
        declared_s = declared_step_s(
            self._servers.known[hop.peer_id],
            hop.span.num_blocks,
            num_tokens,
            (1 + cost) * sent.nbytes,
            self._servers.round_trip_s(hop.peer_id),
        )
        late_after_s = times.late_after_s(num_tokens, declared_s, self._config.min_step_timeout_s)
        reply: Reply | None = None
        with single_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_when_gone, hop.peer_id, late_after_s, nursery.cancel_scope)
                reply = await ask(self._config.timeout_s(num_tokens))
                nursery.cancel_scope.cancel()
        elapsed_s = trio.current_time() - asked_at_s
        if reply is None:
            raise DeadlineExceeded(f"no answer within {elapsed_s:.1f} s, nor a sign of life", hop.peer_id)
        times.note(num_tokens, elapsed_s)
        return reply

    async def _cancel_when_gone(self, peer_id: PeerId, late_after_s: float, call: trio.CancelScope) -> None:
        while True:
            await trio.sleep(late_after_s)
            if not await self._servers.is_alive(peer_id):
                call.cancel()


def _part(terms: CallTerms, hop: Hop) -> WireTuning | None:
    return None if terms.tuning is None else terms.tuning.for_span(hop.span)


def _check_finite(gradients: WireTuning | None, peer_id: PeerId) -> None:
    for wire in () if gradients is None else gradients.tensors():
        if not decode_tensor(wire).isfinite().all():
            raise BadAnswer("the gradients of the tuning hold values that are not finite", peer_id)
