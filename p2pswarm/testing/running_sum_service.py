"""`RunningSumService`: a server without a model, whose answers still depend on every token of a session's past.

A token's answer is the sum of all tokens of its row up to itself, so that a lost, doubled or foreign token shows in
every answer after it, and going back to a position must be exact. The prompts of a tuning, those of all blocks, are
added to the first tokens; there are no layers to tune. No torch.
"""

import math
import struct
from collections.abc import Sequence

import trio

from p2pswarm.core.errors import BadRequest, ServerBusy
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.wire.messages import (
    Backward,
    BackwardReply,
    Codec,
    Forward,
    ForwardReply,
    InfoReply,
    OpenSession,
    Step,
    StepReply,
    WireTensor,
)
from p2pswarm.wire.tuning import WireTuning

SUM_MODEL = ModelId("running-sum@0123456789abcdef")
SUM_SPAN = Span(0, 4)

Row = list[float]


class RunningSumService:
    """A `rpc.service.RpcService` for `SUM_MODEL` with hidden size 1; counts what it opens and closes."""

    def __init__(self, *, max_sessions: int = 1000, max_length: int = 1000, delay_s: float = 0.0) -> None:
        self.num_opened = 0
        self.num_closed = 0
        self.num_working = 0
        self.delay_s = delay_s
        """How long each call and step takes."""
        self._max_sessions = max_sessions
        self._max_length = max_length

    async def info(self, peer_id: PeerId) -> InfoReply:
        await trio.sleep(self.delay_s)
        return InfoReply(sum_server_info(PeerId("somebody")))

    async def open_session(self, peer_id: PeerId, request: OpenSession) -> "RunningSumSession":
        await trio.sleep(self.delay_s)
        self._check_model(request.model_id, request.span)
        read_prompts(request.tuning)
        if request.max_length > self._max_length:
            raise BadRequest(f"sessions have at most {self._max_length} tokens, got {request.max_length}")
        if self.num_opened - self.num_closed >= self._max_sessions:
            raise ServerBusy(f"no room for more than {self._max_sessions} sessions")
        self.num_opened += 1
        return RunningSumSession(self, request)

    async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply:
        self._check_model(request.model_id, request.span)
        prompts = read_prompts(request.tuning)
        rows = [_prompted(row, prompts) for row in read_rows(request.hidden_states)]
        await self.work()
        return ForwardReply(wire_rows([_sums(row) for row in rows]))

    async def backward(self, peer_id: PeerId, request: Backward) -> BackwardReply:
        self._check_model(request.model_id, request.span)
        prompts = read_prompts(request.tuning)
        gradients = [_sums(row[::-1])[::-1] for row in read_rows(request.grad_outputs)]
        await self.work()
        if request.tuning is None:
            return BackwardReply(wire_rows(gradients))
        of_prompt = [sum(row[position] for row in gradients if position < len(row)) for position in range(len(prompts))]
        grad_prompts = wire_rows([of_prompt] * request.span.num_blocks)
        return BackwardReply(wire_rows(gradients), WireTuning(grad_prompts))

    async def work(self) -> None:
        """Takes the time that computing would."""
        self.num_working += 1
        try:
            await trio.sleep(self.delay_s)
        finally:
            self.num_working -= 1

    def _check_model(self, model_id: ModelId, span: Span) -> None:
        if model_id != SUM_MODEL:
            raise BadRequest(f"this server has {SUM_MODEL}, not {model_id}")
        if not SUM_SPAN.contains(span):
            raise BadRequest(f"this server has blocks {SUM_SPAN}, not {span}")


class RunningSumSession:
    """The tokens of one session so far."""

    def __init__(self, service: RunningSumService, request: OpenSession) -> None:
        self._service = service
        self._request = request
        self._prompts = read_prompts(request.tuning)
        self._rows: list[Row] = [[] for _ in range(request.batch_size)]
        self._is_closed = False

    async def step(self, step: Step) -> StepReply:
        new_rows = read_rows(step.hidden_states)
        if len(new_rows) != len(self._rows):
            raise BadRequest(f"this session has {len(self._rows)} rows, got {len(new_rows)}")
        if step.position > len(self._rows[0]):
            raise BadRequest(f"position {step.position} is beyond the {len(self._rows[0])} tokens in the cache")
        if step.position + step.num_tokens > self._request.max_length:
            raise BadRequest(f"this session has room for {self._request.max_length} tokens")
        if not all(math.isfinite(value) for row in new_rows for value in row):
            raise BadRequest("the hidden states hold values that are not finite")
        await self._service.work()
        self._rows = [row[: step.position] + new for row, new in zip(self._rows, new_rows, strict=True)]
        answer = wire_rows([_sums(_prompted(row, self._prompts))[step.position :] for row in self._rows])
        return StepReply(step.step_id, step.position + step.num_tokens, answer)

    async def close(self) -> None:
        assert not self._is_closed, "closed twice"
        self._is_closed = True
        self._service.num_closed += 1


def sum_server_info(peer_id: PeerId) -> ServerInfo:
    """What such a server would announce."""
    return ServerInfo(peer_id, SUM_MODEL, SUM_SPAN, ServerState.ONLINE, (), 4, 1.0, 1.0, 1.0, 1.0, "float32")


def wire_rows(rows: Sequence[Row]) -> WireTensor:
    """Rows of equal length as hidden states [batch, tokens, 1]."""
    data = b"".join(struct.pack(f"<{len(row)}f", *row) for row in rows)
    return WireTensor("float32", (len(rows), len(rows[0]), 1), data)


def read_rows(tensor: WireTensor) -> list[Row]:
    """What `wire_rows` wrote. Raises `BadRequest` for anything else."""
    batch_size, num_tokens, hidden_size = tensor.shape
    if (tensor.dtype, tensor.codec, hidden_size) != ("float32", Codec.NONE, 1):
        raise BadRequest(f"wanted float32 of hidden size 1, got {tensor.dtype} of hidden size {hidden_size}")
    values = struct.unpack(f"<{batch_size * num_tokens}f", tensor.data)
    return [list(values[row * num_tokens : (row + 1) * num_tokens]) for row in range(batch_size)]


def read_prompts(tuning: WireTuning | None) -> Row:
    """What is added to the first tokens. Raises `BadRequest` for a tuning with layers."""
    if tuning is None:
        return []
    if tuning.prompts is None or tuning.layers:
        raise BadRequest("running sums have no layers to tune, only prompts")
    return [sum(of_blocks) for of_blocks in zip(*read_rows(tuning.prompts), strict=True)]


def _prompted(row: Row, prompts: Row) -> Row:
    return [value + prompt for value, prompt in zip(row, prompts, strict=False)] + row[len(prompts) :]


def _sums(row: Row) -> Row:
    sums, total = [], 0.0
    for value in row:
        total += value
        sums.append(total)
    return sums
