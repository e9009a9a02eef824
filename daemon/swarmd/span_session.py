"""One client's session on this server: its KV cache, what of it is padding, and the steps it takes.

A step is checked whole before it changes anything, so a refused step leaves the session as it was. After any other
error the session is over: `rpc/server.py` closes it, and its client starts anew elsewhere. So it is for a session that
was evicted from memory (`swarmd/memory.py`): its next step says so.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import outcome
import torch
import trio

from p2pswarm.blocks.kv_pool import KVPool
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.blocks.span_steps import BatchedStep, PreparedStep
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.core.errors import SessionLost
from p2pswarm.core.ids import PeerId
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.frames import num_bytes
from p2pswarm.wire.messages import OpenSession, Step, StepReply, WireTensor
from swarmd import checks
from swarmd.device_thread import Device
from swarmd.memory import KVMemory, Tenant
from swarmd.padding import Padding
from swarmd.scheduling.dispatcher import Dispatcher, Job
from swarmd.scheduling.work import Kind, Part, Work

SMALL_BYTES = 64 << 10
"""Hidden states up to here are looked at in the trio thread: some 10 us, where a trip to the device takes 100."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all requests to one span share."""

    model: SpanModel
    pool: KVPool
    device: Device
    dispatcher: Dispatcher
    memory: KVMemory


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a step brings, decoded and found fit."""

    hidden_states: torch.Tensor
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    beam_indices: torch.Tensor | None


class SpanSession:
    """The steps of one session; `close` gives its room back."""

    def __init__(
        self,
        shared: Shared,
        peer_id: PeerId,
        request: OpenSession,
        tenant: Tenant,
        tuning: SpanTuning | None = None,
        *,
        max_position: int,
    ) -> None:
        """`tenant`: its place in the memory."""
        self.request = replace(request, tuning=None)  # which is here on the device
        self.tuning = tuning
        self.held = ExitStack()
        """What it gives back when it is closed; filled by who opens it."""
        self.cache = shared.model.new_cache(request.batch_size, request.span, request.max_length, shared.pool)
        self.padding = Padding(request.batch_size, request.max_length)
        self.prepared: PreparedStep | None = None
        """For the next token, if it follows the last one; made while the device has nothing else to do."""
        self.length = 0
        self._num_cuts = 0
        """How often tokens were forgotten."""
        self._shared = shared
        self._peer_id = peer_id
        self._tenant = tenant
        self._max_position = max_position
        self._work: Work | None = None
        tenant.count_pages = lambda: self.cache.num_pages
        tenant.give_up_pages = self._leave_memory

    @property
    def number(self) -> int:
        """Of this session among those of the span."""
        return self._tenant.number

    @property
    def model(self) -> SpanModel:
        return self._shared.model

    async def step(self, step: Step) -> StepReply:
        """Runs the step's tokens. Raises `BadRequest` or `ServerBusy`, and nothing has changed; or `SessionLost`.

        With `CodecError`, which only the answer can show, the step has been taken; the client may repeat it.
        """
        if not self._tenant.is_inside:
            raise SessionLost("the KV memory was full, and others needed this session's part of it")
        checks.check_step(
            step,
            batch_size=self.request.batch_size,
            length=self.length,
            max_length=self.request.max_length,
            hidden_size=self.model.hidden_size,
        )
        job = StepJob(self, step, await self._read(step), self._peer_id)
        self._work = job.work
        try:
            hidden_states = await self._shared.dispatcher.run(job)
        finally:
            self._work = None
        return StepReply(step.step_id, self.length, hidden_states)

    async def close(self) -> None:
        """Gives its room back, as soon as the device has no part of it in hand."""
        self._shared.dispatcher.forget_session(self.number)
        self._shared.dispatcher.when_idle(self._leave)

    def take_room(self, position: int, num_tokens: int, beam_indices: Sequence[int] | None) -> None:
        """Goes back to `position`, follows the beams, and has pages for so many tokens more. Raises `SessionLost`."""
        if position != self.cache.length:
            self._num_cuts += 1
        self._shared.memory.take(self._tenant, partial(self.cache.make_room, position, num_tokens, beam_indices))

    def prepare(self) -> None:
        """On the device: makes what can be made for the next token before it comes.

        Meanwhile the trio thread may give the session room for that token, which does no harm. Where it cuts the cache,
        what was made is worth nothing.
        """
        num_cuts, length = self._num_cuts, self.cache.length
        has_padding = self.padding.mask(length) is not None
        if self._tenant.is_inside and not has_padding and 0 < length < self.request.max_length:
            prepared = self.model.prepare(self.cache, self.request.span)
            self.prepared = prepared if num_cuts == self._num_cuts else None

    async def _read(self, step: Step) -> StepTensors:
        """Raises `BadRequest`."""
        read = partial(checks.read_hidden_states, step.hidden_states)
        is_small = num_bytes(step.hidden_states.data) <= SMALL_BYTES
        return StepTensors(
            mask=checks.read_mask(step.attention_mask),
            position_ids=checks.read_position_ids(step.position_ids, self._max_position),
            beam_indices=checks.read_beam_indices(step.beam_indices, self.request.batch_size),
            hidden_states=read() if is_small else await self._shared.device.run(read),
        )

    def _leave(self) -> None:
        self._leave_memory()
        self.tuning = None
        self.held.close()

    def _leave_memory(self) -> None:
        """Holds no pages any more; a step that waits is over."""
        self._num_cuts += 1
        self.prepared = None
        self.cache.release()
        if self._work is not None:
            error = SessionLost("the KV memory is full, and others need this session's part of it")
            self._shared.dispatcher.end(self._work, error)


class StepJob:
    """A `dispatcher.Job`: one step of a session, in one part or several."""

    def __init__(self, session: SpanSession, step: Step, tensors: StepTensors, peer_id: PeerId) -> None:
        self._session = session
        self._step = step
        self._tensors = tensors
        self._answers: list[torch.Tensor] = []
        self.work = Work(
            Kind.DECODE if step.num_tokens <= 1 else Kind.PREFILL,
            peer_id,
            num_rows=session.request.batch_size,
            num_tokens=step.num_tokens,
            arrived_s=trio.current_time(),
            session=session.number,
            batch_key=self._batch_key(),
        )

    def make_room(self, part: Part) -> None:
        session, step, done = self._session, self._step, self.work.tokens_done
        beams = self._tensors.beam_indices if done == 0 else None
        session.take_room(step.position + done, part.num_tokens, None if beams is None else beams.tolist())
        if done == 0:
            if beams is not None:
                session.padding.reorder(beams)
            session.padding.extend(step.position, step.num_tokens, self._tensors.mask)
            session.length = step.position + step.num_tokens

    def run(self, part: Part) -> WireTensor | None:
        """The answer, with the last part."""
        start = self.work.tokens_done
        end = start + part.num_tokens
        self._answers.append(self._run_tokens(start, end))
        if end < self._step.num_tokens:
            return None
        return self._encoded(self._answers[0] if len(self._answers) == 1 else torch.cat(self._answers, dim=1))

    def run_together(self, jobs: Sequence[Job]) -> Sequence[outcome.Outcome[WireTensor | None]]:
        steps = cast("Sequence[StepJob]", jobs)
        try:
            answers = self._session.model.run_batch([step._batched() for step in steps], self._session.request.adapter)
        except Exception:
            # Isolation border: whichever of them it was, the others can go on. The caches are as they were.
            logger.exception("a batch of %d decode steps failed; they are run one by one", len(steps))
            return [outcome.capture(step.run, Part((step.work,), step.work.num_rows, 1)) for step in steps]
        return [outcome.capture(step._encoded, answer) for step, answer in zip(steps, answers, strict=True)]

    def prepare_next(self) -> None:
        self._session.prepare()

    def _batch_key(self) -> object:
        """None for what only `SpanModel.run` can do."""
        session, step, tensors = self._session, self._step, self._tensors
        is_plain = step.num_tokens == 1 and tensors.mask is None and tensors.position_ids is None
        is_padded = session.padding.mask(step.position) is not None
        if not is_plain or is_padded or session.tuning is not None or not session.model.can_batch:
            return None
        return session.request.span, session.request.adapter

    def _batched(self) -> BatchedStep:
        self._session.prepared = None
        return BatchedStep(self._session.cache, self._tensors.hidden_states, self._step.position)

    def _run_tokens(self, start: int, end: int) -> torch.Tensor:
        """The step's tokens `[start, end)`."""
        session, tensors = self._session, self._tensors
        sent = tensors.hidden_states[:, start:end]
        if start == end:
            return sent
        position = self._step.position + start
        prepared, session.prepared = session.prepared, None
        answer = session.model.run(
            sent,
            session.cache,
            position=position,
            attention_mask=session.padding.mask(position + end - start),
            position_ids=None if tensors.position_ids is None else tensors.position_ids[:, start:end],
            blocks=session.request.span,
            prepared=prepared,
            adapter=session.request.adapter,
            tuning=session.tuning,
        )
        return answer.to(sent.dtype)

    def _encoded(self, answer: torch.Tensor) -> WireTensor:
        if self._session.tuning is not None:  # whatever it is, it must not look as if this server computed nonsense
            checks.checked_answer("hidden states", answer, self._session.model.dtype)
        return encode_tensor(answer.to(self._tensors.hidden_states.dtype), self._session.request.codec)
