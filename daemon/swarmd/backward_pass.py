"""Gradients back through the span, for rows without a session: some rows at a time, each in stages.

How many rows are under way is bounded by the memory there is for them (`swarmd/training_memory.py`), and the scheduler
lets only one request have rows under way; so what all requests together take is bounded too, but for what they sent and
what they are answered, which is counted where messages are received.
"""

from typing import Any

import trio

from p2pswarm.blocks.span_backward import Gradients, RoundTrip, num_stages
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.core.ids import PeerId
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import Backward, BackwardReply
from p2pswarm.wire.tensor_rows import joined_rows
from p2pswarm.wire.tensors import WireTensor
from swarmd import checks
from swarmd.batch_tensors import BackwardTensors
from swarmd.scheduling.work import Kind, Part, Work
from swarmd.span_session import Shared
from swarmd.training_memory import TripSize
from swarmd.tunings import write_gradients


class BackwardJob:
    """A `dispatcher.Job`, which gives a `BackwardReply`."""

    def __init__(
        self, shared: Shared, peer_id: PeerId, request: Backward, tensors: BackwardTensors, trip: TripSize
    ) -> None:
        """`trip`: for which there is memory."""
        self._shared = shared
        self._request = request
        self._tensors = tensors
        self._num_noted = trip.num_noted
        self._under_way: RoundTrip | None = None
        self._grad_inputs: list[WireTensor] = []
        """Of the rows that are done."""
        self._grad_tuning: SpanTuning | None = None
        """The sum over the rows that are done."""
        num_rows, num_tokens, _ = request.hidden_states.shape
        self.work = Work(
            Kind.BACKWARD,
            peer_id,
            num_rows,
            num_tokens,
            trio.current_time(),
            num_stages=num_stages(request.span.num_blocks, trip.num_noted),
            stage_passes=1 / shared.model.span.num_blocks,
            max_rows=trip.max_rows,
        )

    def make_room(self, part: Part) -> None:
        """Nothing: the rows that are under way have their room."""

    def run(self, part: Part) -> BackwardReply | None:
        under_way = self._under_way or self._begin(part.num_rows)
        self._under_way = under_way
        under_way.go_on(part.num_stages)
        if under_way.is_done:
            self._take_up(under_way.gradients)
            self._under_way = None
            if self.work.rows_done + part.num_rows == self.work.num_rows:
                return self._reply()
        return None

    def run_together(self, jobs: Any) -> Any:
        raise AssertionError("backward passes run alone")

    def prepare_next(self) -> None:
        """Nothing: no other request goes on from this one."""

    def _begin(self, num_rows: int) -> RoundTrip:
        tensors, start = self._tensors, self.work.rows_done
        rows = slice(start, start + num_rows)
        return self._shared.model.start_backward(
            tensors.hidden_states(rows),
            tensors.grad_outputs(rows),
            attention_mask=None if tensors.mask is None else tensors.mask[rows],
            position_ids=None if tensors.position_ids is None else tensors.position_ids[rows],
            blocks=self._request.span,
            adapter=self._request.adapter,
            tuning=tensors.tuning,
            num_noted=self._num_noted,
        )

    def _take_up(self, done: Gradients) -> None:
        """Raises `BadRequest`, `CodecError`."""
        grad_inputs = done.inputs.to("cpu", self._tensors.dtype)
        checks.checked_answer("gradients", grad_inputs, self._shared.model.dtype)
        self._grad_inputs.append(encode_tensor(grad_inputs, self._request.codec))
        if done.tuning is not None:
            self._grad_tuning = done.tuning if self._grad_tuning is None else self._grad_tuning.plus(done.tuning)

    def _reply(self) -> BackwardReply:
        tuning, grad_tuning = self._request.tuning, None
        if tuning is not None:
            assert self._grad_tuning is not None
            grad_tuning = write_gradients(self._grad_tuning, tuning)
        return BackwardReply(joined_rows(self._grad_inputs), grad_tuning)
