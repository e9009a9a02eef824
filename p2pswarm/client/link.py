"""One hop of a chain, live: a session that is open at the hop's server, and what is known of it.

A link never mends itself. Whatever goes wrong with it is a `HopFailed`, and then the link is closed.
"""

import math
import secrets
from dataclasses import dataclass
from typing import TypeVar

import torch
import trio

from p2pswarm.client.step_input import StepInput
from p2pswarm.client.step_times import SLOW_PATH_BYTES_PER_S, declared_step_s
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import BadAnswer, NetworkError, RemoteError, RequestRefused
from p2pswarm.core.ids import ModelId, SessionId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.routing.route import Hop
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.wire.codecs import decode_tensor
from p2pswarm.wire.framed_stream import SLOWEST_BYTES_PER_S
from p2pswarm.wire.frames import num_bytes
from p2pswarm.wire.messages import (
    MAX_NEXT_HOP_ADDRESSES,
    Codec,
    NextHop,
    OpenSession,
    PushedStep,
    Step,
    StepReply,
    WireTensor,
)

SEND_TIMEOUT_S = 30.0
"""For a server to begin to take a step; long ones get the time that a slow path needs."""

HopError = TypeVar("HopError", bound=RemoteError | NetworkError | RequestRefused)


class HopFailed(Exception):
    """A hop that cannot go on, and the error (which names it) that says why. Stays within this room."""

    def __init__(self, hop: Hop, error: RemoteError | NetworkError | RequestRefused) -> None:
        super().__init__(str(error))
        self.hop = hop
        self.error = at_hop(error, hop)
        self.error.__cause__ = error


@dataclass(frozen=True, slots=True)
class LinkTerms:
    """What is asked of every server of a session."""

    model_id: ModelId
    max_length: int
    batch_size: int
    codec: Codec
    alloc_timeout_s: float
    adapter: str | None
    tuning: Tuning | None = None


class Link:
    """Made by `open_link`."""

    def __init__(
        self, hop: Hop, server: ServerInfo, dtype: torch.dtype, remote: RemoteSession, scope: trio.CancelScope
    ) -> None:
        self.hop = hop
        self.server = server
        """As announced when the link was opened."""
        self.dtype = dtype
        """What the server computes in, and so is sent."""
        self.as_next_hop = NextHop(hop.peer_id, remote.request.session_id, server.addresses[:MAX_NEXT_HOP_ADDRESSES])
        """What the server before needs to know to hand its output on."""
        self.length = 0
        """Tokens in the server's cache."""
        self.filled_step_id = -1
        """The step during which the link was opened and its cache filled."""
        self.announced_step_id = -1
        """The last step that the server was told to await from the server before it."""
        self.sent_step_id = -1
        """The last step that was sent with its hidden states."""
        self.answered_step_id = -1
        self._remote = remote
        self._asked: Step | PushedStep | None = None
        self._scope = scope

    @property
    def can_push(self) -> bool:
        """Whether its server is new enough to push, and to be pushed to."""
        return self._remote.can_push

    @property
    def owes_an_answer(self) -> bool:
        """Whether the server was told of a step, or of a part of a replay, that it has not answered."""
        return max(self.sent_step_id, self.announced_step_id) > self.answered_step_id

    async def send(self, step: Step) -> None:
        """Sends the step, unless that was done before."""
        if self.sent_step_id != step.step_id:
            self.sent_step_id = step.step_id
            self._asked = step
            path_s = num_bytes(step.hidden_states.data) / SLOWEST_BYTES_PER_S
            await self._remote.send(step, SEND_TIMEOUT_S + path_s)

    async def announce(self, step: PushedStep) -> None:
        """Tells the server to await the step from the server before it."""
        self.announced_step_id = step.step_id
        self._asked = step
        await self._remote.send(step)

    async def reply_within(self, timeout_s: float) -> StepReply | None:
        """The answer to what was asked last; None where it has not come yet."""
        assert self._asked is not None, "nothing was asked"
        return await self._remote.reply_within(self._asked, timeout_s)

    def declared_s(self, step: StepInput, round_trip_s: float) -> float:
        """What such a step takes by the server's own announcement."""
        sent_bytes = 2 * step.hidden_states.nbytes  # there and back
        return declared_step_s(
            self.server, self.hop.span.num_blocks, step.num_tokens_in_total, sent_bytes, round_trip_s
        )

    def close(self) -> None:
        """Ends the session at the server, without waiting."""
        self._scope.cancel()


async def open_link(
    rpc: RpcClient,
    hop: Hop,
    server: ServerInfo,
    dtype: torch.dtype,
    terms: LinkTerms,
    first_tokens: int,
    timeout_s: float,
    *,
    task_status: trio.TaskStatus[Link] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Opens a session at the hop, hands over the link, and keeps it open until it is closed.

    `first_tokens` of each sequence will be sent at once. `timeout_s` does not count the wait for room that `terms`
    allow, nor the way of a tuning. Raises what `RpcClient.open_session` raises while it opens.
    """
    tuning = None if terms.tuning is None else terms.tuning.for_span(hop.span)
    request = OpenSession(
        SessionId(secrets.token_hex(16)),
        terms.model_id,
        hop.span,
        terms.max_length,
        terms.batch_size,
        terms.codec,
        terms.adapter,
        alloc_timeout_s=terms.alloc_timeout_s,
        first_tokens=first_tokens,
        tuning=tuning,
    )
    timeout_s += terms.alloc_timeout_s + (0 if tuning is None else tuning.num_bytes / SLOW_PATH_BYTES_PER_S)
    with trio.CancelScope() as scope:
        async with rpc.open_session(hop.peer_id, request, timeout_s) as remote:
            task_status.started(Link(hop, server, dtype, remote, scope))
            await trio.sleep_forever()


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
