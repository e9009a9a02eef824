"""A model without weights: blocks that count in whole numbers, so that an answer is right to the last bit or wrong.

What a block makes of a token depends on the block, on every token of the row before it that is not padding, and on the
token's position id. A token lost, doubled, out of order or in a foreign row therefore shows in every answer after it,
whatever spans the blocks are cut into. So it is with the way back: what a block makes of a gradient depends on the
block, on the gradients of every token after it, and on what entered the block on the way there. (That is no derivative,
but it is wrong wherever a derivative would be.) Prompts of a tuning are whole numbers; there are no layers to tune.
`run_blocks` and `run_blocks_back` are the truth; `ArithmeticService` serves a span of it.
"""

from dataclasses import dataclass

import torch
import trio

from p2pswarm.core.errors import BadRequest, ServerBusy
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.wire.codecs import decode_tensor, encode_tensor, is_finite
from p2pswarm.wire.messages import (
    Backward,
    BackwardReply,
    Forward,
    ForwardReply,
    InfoReply,
    OpenSession,
    Step,
    StepReply,
    WireTensor,
)
from p2pswarm.wire.tuning import WireTuning

ARITHMETIC_MODEL = ModelId("arithmetic@0123456789abcdef")
HIDDEN_SIZE = 1
MODULUS = 65_521
"""The largest prime below 2^16: float32 carries every value exactly."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Rows of tokens in front of some block, and what the blocks must know of them."""

    values: torch.Tensor
    """int64 [batch, tokens], 0 up to `MODULUS`."""
    counts: torch.Tensor
    """bool [batch, tokens]: False for padding."""
    position_ids: torch.Tensor
    """int64 [batch, tokens]"""

    @classmethod
    def none(cls, batch_size: int) -> "Tokens":
        """Rows without tokens."""
        empty = torch.empty(batch_size, 0, dtype=torch.int64)
        return cls(empty, empty.bool(), empty)

    @property
    def length(self) -> int:
        return self.values.shape[1]

    def cropped(self, length: int) -> "Tokens":
        return Tokens(self.values[:, :length], self.counts[:, :length], self.position_ids[:, :length])

    def reordered(self, rows: torch.Tensor) -> "Tokens":
        return Tokens(self.values[rows], self.counts[rows], self.position_ids[rows])

    def followed_by(
        self, hidden_states: torch.Tensor, counts: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> "Tokens":
        """With `hidden_states` [batch, tokens, 1] at the end of the rows; None stands for what it does in a `Step`."""
        values = hidden_states[:, :, 0].to(torch.int64)
        if counts is None:
            counts = torch.ones_like(values, dtype=torch.bool)
        if position_ids is None:
            position_ids = torch.arange(self.length, self.length + values.shape[1]).expand_as(values)
        return Tokens(
            torch.cat([self.values, values], dim=1),
            torch.cat([self.counts, counts], dim=1),
            torch.cat([self.position_ids, position_ids], dim=1),
        )


def run_blocks(blocks: Span, tokens: Tokens, prompts: torch.Tensor | None = None) -> torch.Tensor:
    """The hidden states, float32 [batch, tokens, 1], that the blocks make of whole rows.

    `prompts`: [blocks, prompt tokens, 1], for the first tokens of the rows where they enter each block.
    """
    *_, values = _values_on_the_way(blocks, tokens, prompts)
    return values.to(torch.float32)[:, :, None]


def run_blocks_back(
    blocks: Span, tokens: Tokens, grad_outputs: torch.Tensor, prompts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What goes back through the blocks: to the inputs, float32 [batch, tokens, 1], and to `prompts`, in their shape,
    over all rows."""
    entered = _values_on_the_way(blocks, tokens, prompts)
    gradients = grad_outputs[:, :, 0].to(torch.int64)
    grad_prompts = None if prompts is None else torch.zeros_like(prompts, dtype=torch.float32)
    for block_index in range(blocks.end - 1, blocks.start - 1, -1):
        later = gradients.flip(1).cumsum(dim=1).flip(1)
        values = entered[block_index - blocks.start]
        gradients = ((block_index + 2) * gradients + later * tokens.counts + values) % MODULUS
        if grad_prompts is not None:
            num_prompted = min(grad_prompts.shape[1], tokens.length)
            grad_prompts[block_index - blocks.start, :num_prompted, 0] = gradients[:, :num_prompted].sum(dim=0)
    return gradients.to(torch.float32)[:, :, None], grad_prompts


def _values_on_the_way(blocks: Span, tokens: Tokens, prompts: torch.Tensor | None) -> list[torch.Tensor]:
    """What each block computes with, prompts added, and in the end what leaves the last one; int64 [batch, tokens]."""
    values, entered = tokens.values, []
    for block_index in range(blocks.start, blocks.end):
        if prompts is not None:
            prompt = prompts[block_index - blocks.start, : tokens.length, 0].to(torch.int64)
            values = torch.cat([values[:, : len(prompt)] + prompt, values[:, len(prompt) :]], dim=1) % MODULUS
        entered.append(values)
        seen = (values * tokens.counts).cumsum(dim=1)
        values = ((block_index + 2) * values + seen + tokens.position_ids) % MODULUS
    return [*entered, values]


class ArithmeticService:
    """A `rpc.service.RpcService` of the blocks that `info` announces; counts what it opens and closes."""

    def __init__(self, info: ServerInfo, *, delay_s: float = 0.0, max_sessions: int = 1000) -> None:
        self._info = info
        self.num_opened = 0
        self.num_closed = 0
        self.num_tokens_run = 0
        """Over all rows and sessions, those of replays and of passes without a session too."""
        self.delay_s = delay_s
        """How long each step, forward or backward pass takes."""
        self._max_sessions = max_sessions

    async def info(self, peer_id: PeerId) -> InfoReply:
        return InfoReply(self._info)

    async def open_session(self, peer_id: PeerId, request: OpenSession) -> "ArithmeticSession":
        self._check(request.model_id, request.span)
        prompts = read_prompts(request.tuning)
        if self.num_opened - self.num_closed >= self._max_sessions:
            raise ServerBusy(f"no room for more than {self._max_sessions} sessions")
        self.num_opened += 1
        return ArithmeticSession(self, request, prompts)

    async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply:
        self._check(request.model_id, request.span)
        tokens, prompts = _read_tokens(request), read_prompts(request.tuning)
        await self.work(tokens.values.numel())
        return ForwardReply(encode_tensor(run_blocks(request.span, tokens, prompts), request.codec))

    async def backward(self, peer_id: PeerId, request: Backward) -> BackwardReply:
        self._check(request.model_id, request.span)
        tokens, prompts = _read_tokens(request), read_prompts(request.tuning)
        grad_outputs = read_hidden_states(request.grad_outputs)
        await self.work(tokens.values.numel())
        gradients, of_prompts = run_blocks_back(request.span, tokens, grad_outputs, prompts)
        grad_tuning = None if of_prompts is None else WireTuning(encode_tensor(of_prompts))
        return BackwardReply(encode_tensor(gradients, request.codec), grad_tuning)

    async def work(self, num_tokens: int) -> None:
        """Takes the time that computing would."""
        await trio.sleep(self.delay_s)
        self.num_tokens_run += num_tokens

    def _check(self, model_id: ModelId, span: Span) -> None:
        if model_id != ARITHMETIC_MODEL:
            raise BadRequest(f"this server has {ARITHMETIC_MODEL}, not {model_id}")
        if not self._info.span.contains(span):
            raise BadRequest(f"this server has blocks {self._info.span}, asked were {span}")


class ArithmeticSession:
    """The tokens of one session so far."""

    def __init__(self, service: ArithmeticService, request: OpenSession, prompts: torch.Tensor | None) -> None:
        self._service = service
        self._request = request
        self._prompts = prompts
        self._tokens = Tokens.none(request.batch_size)
        self._is_closed = False

    async def step(self, step: Step) -> StepReply:
        new = read_hidden_states(step.hidden_states)
        if new.shape[0] != self._request.batch_size:
            raise BadRequest(f"this session has {self._request.batch_size} rows, got {new.shape[0]}")
        if step.position > self._tokens.length:
            raise BadRequest(f"position {step.position} is beyond the {self._tokens.length} tokens in the cache")
        if step.position + step.num_tokens > self._request.max_length:
            raise BadRequest(f"this session has room for {self._request.max_length} tokens")
        position_ids, beam_indices = _decoded(step.position_ids), _decoded(step.beam_indices)
        if position_ids is not None and (position_ids < 0).any():
            raise BadRequest("position ids are 0 or more")
        if beam_indices is not None and ((beam_indices < 0) | (beam_indices >= self._request.batch_size)).any():
            raise BadRequest(f"beam indices are rows below {self._request.batch_size}, got {beam_indices.tolist()}")
        await self._service.work(new.numel())
        kept = self._tokens.cropped(step.position)
        if beam_indices is not None:
            kept = kept.reordered(beam_indices)
        self._tokens = kept.followed_by(new, _decoded(step.attention_mask), position_ids)
        answer = run_blocks(self._request.span, self._tokens, self._prompts)[:, step.position :]
        return StepReply(step.step_id, self._tokens.length, encode_tensor(answer, self._request.codec))

    async def close(self) -> None:
        assert not self._is_closed, "closed twice"
        self._is_closed = True
        self._service.num_closed += 1


def arithmetic_server_info(peer_id: PeerId, span: Span, *, num_model_blocks: int) -> ServerInfo:
    """What such a server would announce; its addresses are for the caller to fill in."""
    return ServerInfo(
        peer_id=peer_id,
        model_id=ARITHMETIC_MODEL,
        span=span,
        state=ServerState.ONLINE,
        addresses=(),
        num_model_blocks=num_model_blocks,
        throughput_tokens_per_s=100.0,
        inference_tokens_per_s=1000.0,
        forward_tokens_per_s=10_000.0,
        network_tokens_per_s=10_000.0,
        dtype="float32",
        cache_tokens_left=1 << 20,
        max_length=1 << 16,
    )


def read_hidden_states(wire: WireTensor) -> torch.Tensor:
    """[batch, tokens, 1]. Raises `BadRequest` for anything that is no token of this model."""
    hidden_states = decode_tensor(wire)
    if hidden_states.shape[2] != HIDDEN_SIZE or not is_finite(hidden_states):
        raise BadRequest(f"wanted finite numbers of hidden size {HIDDEN_SIZE}, got shape {list(wire.shape)}")
    return hidden_states


def read_prompts(tuning: WireTuning | None) -> torch.Tensor | None:
    """[blocks, prompt tokens, 1]. Raises `BadRequest` for a tuning with layers."""
    if tuning is None:
        return None
    if tuning.prompts is None or tuning.layers:
        raise BadRequest("the arithmetic model has no layers to tune, only prompts")
    return read_hidden_states(tuning.prompts)


def _read_tokens(request: Forward | Backward) -> Tokens:
    hidden_states = read_hidden_states(request.hidden_states)
    return Tokens.none(hidden_states.shape[0]).followed_by(
        hidden_states, _decoded(request.attention_mask), _decoded(request.position_ids)
    )


def _decoded(wire: WireTensor | None) -> torch.Tensor | None:
    return None if wire is None else decode_tensor(wire)
