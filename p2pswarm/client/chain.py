"""A route made live: one open session at each of its servers, and steps that pass through all of them in order.

A chain never mends itself: when a hop fails, the error names the server and its blocks, and the chain is useless.
`client/session.py` opens chains and decides what happens then.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import BadAnswer, NetworkError, RemoteError, RequestRefused, SwarmingError
from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.routing.route import Hop, Route
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import Codec, OpenSession, Step, WireTensor


@dataclass(frozen=True, slots=True)
class ChainTerms:
    """What is asked of every server of a chain."""

    session_id: SessionId
    model_id: ModelId
    max_length: int
    batch_size: int
    codec: Codec
    dtypes: Mapping[PeerId, torch.dtype]
    """What each server computes in, and so is sent."""


class Chain:
    """Open sessions at the hops of `route`. Made by `open_chain`; steps must not overlap."""

    def __init__(
        self,
        route: Route,
        terms: ChainTerms,
        remotes: Sequence[RemoteSession],
        config: ClientConfig,
        scope: trio.CancelScope,
    ) -> None:
        self.route = route
        self.terms = terms
        self._remotes = tuple(remotes)
        self._config = config
        self._scope = scope
        self._next_step_id = 0

    def close(self) -> None:
        """Ends the sessions at all servers, without waiting."""
        self._scope.cancel()

    async def step(self, step: StepInput) -> torch.Tensor:
        """The hidden states after the last block, in the dtype of `step.hidden_states`.

        Raises what the failing hop's call raises, naming the hop. After an error, or cancelled half-way, the servers'
        caches may differ and the chain must be closed.
        """
        mask, position_ids, beams = (
            _encode_extra(tensor) for tensor in (step.attention_mask, step.position_ids, step.beam_indices)
        )
        timeout_s = self._config.timeout_s(step.num_tokens_in_total)
        step_id, self._next_step_id = self._next_step_id, self._next_step_id + 1
        hidden_states, wire = step.hidden_states, None
        for hop, remote in zip(self.route.hops, self._remotes, strict=True):
            wire = self._for_hop(hop, hidden_states, wire)
            try:
                reply = await remote.step(Step(step_id, step.position, wire, mask, position_ids, beams), timeout_s)
                wire = reply.hidden_states
                hidden_states = decode_finite(wire, hop)
            except (RemoteError, NetworkError, RequestRefused) as error:
                raise at_hop(error, hop) from error
        return hidden_states.to(step.hidden_states.dtype)

    def _for_hop(self, hop: Hop, hidden_states: torch.Tensor, received: WireTensor | None) -> WireTensor:
        """What to send to the hop: the last answer as it came, unless this server computes in another dtype."""
        dtype = self.terms.dtypes[hop.peer_id]
        if received is not None and hidden_states.dtype == dtype and received.codec is self.terms.codec:
            return received
        return encode_tensor(hidden_states.to(dtype), self.terms.codec)


async def open_chain(
    rpc: RpcClient,
    route: Route,
    terms: ChainTerms,
    config: ClientConfig,
    *,
    task_status: trio.TaskStatus[Chain] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Opens a session at every hop at once, hands over the chain, and keeps it open until it is closed.

    Raises the first hop's failure, with all others closed again.
    """
    remotes: dict[Hop, RemoteSession] = {}
    failures: list[SwarmingError] = []

    async def hold_open(hop: Hop, *, task_status: trio.TaskStatus[None]) -> None:
        request = OpenSession(
            terms.session_id, terms.model_id, hop.span, terms.max_length, terms.batch_size, terms.codec
        )
        async with rpc.open_session(hop.peer_id, request, config.open_timeout_s) as remotes[hop]:
            task_status.started()
            await trio.sleep_forever()

    async def open_hop(hop: Hop) -> None:
        try:
            await holding.start(hold_open, hop)
        except (RemoteError, NetworkError, RequestRefused) as error:
            failures.append(at_hop(error, hop))
            opening.cancel_scope.cancel()

    async with trio.open_nursery() as holding:
        async with trio.open_nursery() as opening:
            for hop in route.hops:
                opening.start_soon(open_hop, hop)
        if failures:
            holding.cancel_scope.cancel()
        else:
            open_remotes = [remotes[hop] for hop in route.hops]
            task_status.started(Chain(route, terms, open_remotes, config, holding.cancel_scope))
            await trio.sleep_forever()
    if failures:
        raise failures[0]


HopError = TypeVar("HopError", bound=RemoteError | NetworkError | RequestRefused)


def at_hop(error: HopError, hop: Hop) -> HopError:
    """The same kind of error, saying which server and blocks it came from."""
    return type(error)(f"blocks {hop.span} at {hop.peer_id}: {error}", hop.peer_id)


def decode_finite(wire: WireTensor, hop: Hop) -> torch.Tensor:
    """The answer's tensor. Raises `BadAnswer` when a value is not a finite number."""
    hidden_states = decode_tensor(wire)
    # The sum is not finite if any value is not: one pass. Large finite values can do that too, so then look closely.
    if not math.isfinite(hidden_states.sum(dtype=torch.float32)) and not torch.isfinite(hidden_states).all():
        raise BadAnswer("the hidden states hold values that are not finite", hop.peer_id)
    return hidden_states


def _encode_extra(tensor: torch.Tensor | None) -> WireTensor | None:
    return None if tensor is None else encode_tensor(tensor)
