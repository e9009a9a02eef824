"""What this server answers: `RpcService` over one span of one model.

Decides what is refused (`swarmd/checks.py`) and who gets room (`swarmd/memory.py`), and hands the computing to the
device. Knows nothing of streams and deadlines: those are `rpc/server.py`'s. Read `swarmd/span_session.py` next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.core.errors import BadRequest
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.span import Span
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import Forward, ForwardReply, InfoReply, OpenSession
from swarmd import checks
from swarmd.device_thread import Device
from swarmd.memory import CacheBudget
from swarmd.span_session import SpanSession

MAX_TOKENS_AT_ONCE = 2048
"""Of a forward pass without a cache: longer batches run in parts, row by row, so that other requests get in between."""


@dataclass(frozen=True, slots=True)
class Served:
    """The part of the world that a handler serves."""

    model_id: ModelId
    model: SpanModel
    max_length: int
    """Longest session, and longest sequence of a forward pass, in tokens."""


class SpanService:
    """Implements `rpc.service.RpcService`."""

    def __init__(self, served: Served, device: Device, budget: CacheBudget, describe: Callable[[], InfoReply]) -> None:
        self._served = served
        self._device = device
        self._budget = budget
        self._describe = describe

    async def info(self, peer_id: PeerId) -> InfoReply:
        return self._describe()

    async def open_session(self, peer_id: PeerId, request: OpenSession) -> SpanSession:
        """A session with all the room it may ever need. Raises `BadRequest`, `ServerBusy`."""
        served = self._served
        checks.check_model(request.model_id, served.model_id)
        checks.check_span(request.span, served.model.span)
        checks.check_open(request, max_length=served.max_length)
        reservation = self._budget.reserve(request.batch_size * request.max_length, request.span.num_blocks)
        return SpanSession(
            served.model,
            self._device,
            request,
            max_position=served.max_length,
            release=lambda: self._budget.release(reservation),
        )

    async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply:
        """The whole batch through the asked blocks, without a cache. Raises `BadRequest`, `ServerBusy`."""
        served = self._served
        checks.check_model(request.model_id, served.model_id)
        checks.check_span(request.span, served.model.span)
        checks.check_hidden_size(request.hidden_states, served.model.hidden_size)
        batch_size, num_tokens, _ = request.hidden_states.shape
        if not 1 <= num_tokens <= served.max_length:
            raise BadRequest(f"this server takes sequences of 1 to {served.max_length} tokens, got {num_tokens}")
        inputs = await self._device.run(partial(_read_inputs, request, served.max_length))
        rows_at_once = max(1, MAX_TOKENS_AT_ONCE // num_tokens)
        parts = [
            await self._device.run(
                partial(_run_rows, served.model, request.span, inputs, slice(start, start + rows_at_once))
            )
            for start in range(0, batch_size, rows_at_once)
        ]
        return ForwardReply(await self._device.run(lambda: encode_tensor(torch.cat(parts), request.codec)))


@dataclass(frozen=True, slots=True)
class _Inputs:
    hidden_states: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None


def _read_inputs(request: Forward, max_length: int) -> _Inputs:
    return _Inputs(
        checks.read_hidden_states(request.hidden_states),
        checks.read_mask(request.attention_mask),
        checks.read_position_ids(request.position_ids, max_length),
    )


def _run_rows(model: SpanModel, blocks: Span, inputs: _Inputs, rows: slice) -> torch.Tensor:
    """On the device's thread: some rows of the batch, which know nothing of one another."""
    hidden_states = inputs.hidden_states[rows]
    answer = model.run(
        hidden_states,
        None,
        position=0,
        attention_mask=None if inputs.attention_mask is None else inputs.attention_mask[rows],
        position_ids=None if inputs.position_ids is None else inputs.position_ids[rows],
        blocks=blocks,
    )
    return answer.to("cpu", hidden_states.dtype)
