"""A forward pass without a session: rows of tokens through the span, some at a time, or a long row in pieces.

Rows know nothing of one another, so that they may run in any number of parts. A row that is too long for the time there
is runs through a cache of its own, as a prompt would; its pages come out of the same memory as those of sessions, and
are the first to be taken away.
"""

from functools import partial
from typing import Any

import torch
import trio

from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.core.errors import ServerBusy, SessionLost
from p2pswarm.core.ids import PeerId
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import Forward, ForwardReply
from p2pswarm.wire.tensor_rows import joined_rows
from p2pswarm.wire.tensors import WireTensor
from swarmd import checks
from swarmd.batch_tensors import BatchTensors
from swarmd.memory import Tenant
from swarmd.scheduling.work import Kind, Part, Work
from swarmd.span_session import Shared


class ForwardJob:
    """A `dispatcher.Job`, which gives a `ForwardReply`. `close` it, whatever became of it."""

    def __init__(self, shared: Shared, peer_id: PeerId, request: Forward, tensors: BatchTensors) -> None:
        self._shared = shared
        self._request = request
        self._tensors = tensors
        self._cache: SpanCache | None = None
        self._tenant: Tenant | None = None
        """Once a row runs in pieces."""
        self._sent: torch.Tensor | None = None
        """The row that is not done yet, if it runs in pieces."""
        self._pieces: list[torch.Tensor] = []
        """Answers to it."""
        self._answers: list[WireTensor] = []
        """To the rows that are done."""
        num_rows, num_tokens, _ = request.hidden_states.shape
        self.work = Work(Kind.FORWARD, peer_id, num_rows, num_tokens, trio.current_time())

    def make_room(self, part: Part) -> None:
        """Raises `ServerBusy` where there are no pages for a long row."""
        if part.num_tokens == self.work.num_tokens:
            return
        tenant = self._tenant or self._come()
        assert self._cache is not None
        try:
            self._shared.memory.take(tenant, partial(self._cache.make_room, self.work.tokens_done, part.num_tokens))
        except SessionLost as error:
            raise self._no_room() from error

    def run(self, part: Part) -> ForwardReply | None:
        work = self.work
        rows = slice(work.rows_done, work.rows_done + part.num_rows)
        start = work.tokens_done
        end = start + part.num_tokens
        cache = None if part.num_tokens == work.num_tokens else self._cache
        self._sent = self._tensors.hidden_states(rows) if self._sent is None else self._sent
        self._pieces.append(self._run(self._sent[:, start:end], rows, start, cache))
        if end < work.num_tokens:
            return None
        answer = checks.checked_answer("hidden states", torch.cat(self._pieces, dim=1), self._shared.model.dtype)
        self._answers.append(encode_tensor(answer, self._request.codec))
        self._sent, self._pieces = None, []
        return ForwardReply(joined_rows(self._answers)) if rows.stop == work.num_rows else None

    def run_together(self, jobs: Any) -> Any:
        raise AssertionError("forward passes run alone")

    def prepare_next(self) -> None:
        """Nothing: no other forward pass goes on from this one."""

    def close(self) -> None:
        """Gives pages back, as soon as the device has no part of it in hand."""
        if self._tenant is not None:
            self._shared.dispatcher.when_idle(self._leave)

    def _come(self) -> Tenant:
        memory, num_tokens = self._shared.memory, self.work.num_tokens
        tenant = memory.come(1, num_tokens, num_tokens, owner=self.work.peer_id, is_session=False)
        if not tenant.is_inside:
            memory.leave(tenant)
            raise self._no_room()
        cache = self._shared.model.new_cache(1, self._request.span, num_tokens, self._shared.pool)
        tenant.count_pages = lambda: cache.num_pages
        tenant.give_up_pages = self._give_up_pages
        self._cache, self._tenant = cache, tenant
        return tenant

    def _no_room(self) -> ServerBusy:
        return ServerBusy(f"no room for {self.work.num_tokens} tokens of KV cache, which a long forward pass takes")

    def _give_up_pages(self) -> None:
        assert self._cache is not None
        self._cache.release()
        self._shared.dispatcher.end(self.work, self._no_room())

    def _leave(self) -> None:
        assert self._cache is not None
        assert self._tenant is not None
        self._cache.release()
        self._shared.memory.leave(self._tenant)

    def _run(self, hidden_states: torch.Tensor, rows: slice, start: int, cache: SpanCache | None) -> torch.Tensor:
        tensors, end = self._tensors, start + hidden_states.shape[1]
        answer = self._shared.model.run(
            hidden_states,
            cache,
            position=start,
            attention_mask=None if tensors.mask is None else tensors.mask[rows, :end],
            position_ids=None if tensors.position_ids is None else tensors.position_ids[rows, start:end],
            blocks=self._request.span,
            adapter=self._request.adapter,
            tuning=tensors.tuning,
        )
        return answer.to("cpu", hidden_states.dtype)
