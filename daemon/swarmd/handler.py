"""What this server answers: `RpcService` over one span of one model.

Decides what is refused (`swarmd/checks.py`) and who gets room (`swarmd/memory.py`), and hands the computing to the
device by way of the scheduler. Knows nothing of streams and deadlines: those are `rpc/server.py`'s. Read
`swarmd/span_session.py` next.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import trio

from p2pswarm.blocks.kv_pool import KVPool
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.core.errors import ServerBusy
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.wire.messages import Backward, BackwardReply, Forward, ForwardReply, InfoReply, OpenSession
from swarmd import checks
from swarmd.backward_pass import BackwardJob
from swarmd.batch_tensors import BackwardTensors, BatchTensors
from swarmd.device_thread import Device
from swarmd.forward_pass import ForwardJob
from swarmd.memory import KVMemory, Tenant
from swarmd.scheduling.costs import CostModel
from swarmd.scheduling.dispatcher import Dispatcher
from swarmd.scheduling.scheduler import Scheduler
from swarmd.span_session import Shared, SpanSession
from swarmd.training_memory import AskedRows, BackwardMemory, TripSize, trip_size
from swarmd.tuning_memory import DEFAULT_MAX_BYTES, TuningMemory
from swarmd.tunings import held_bytes, read_tuning
from swarmd.working_memory import backward_memory


@dataclass(frozen=True, slots=True)
class Served:
    """The part of the world that a handler serves."""

    model_id: ModelId
    model: SpanModel
    pool: KVPool
    """For the keys and values of all sessions."""
    max_length: int
    """Longest session, and longest row of a forward or backward pass, in tokens."""
    training_bytes: int | None = None
    """What gradients may take while they are computed; None: what a row of a sensible length takes."""
    max_tuning_bytes: int = DEFAULT_MAX_BYTES
    """Of what a client brings along with one call or session."""


class SpanService:
    """Implements `rpc.service.RpcService`. Made in a trio loop."""

    def __init__(
        self,
        served: Served,
        device: Device,
        describe: Callable[[], InfoReply],
        costs: CostModel | None = None,
        is_shared: Callable[[float], bool] = lambda now_s: False,
    ) -> None:
        """`costs`: what is known of the device's speed; without, it is learnt from the first requests. `is_shared`:
        whether other processes use the time for which the device waits."""
        self.memory = KVMemory(served.pool.pages)
        self.tunings = TuningMemory(served.max_tuning_bytes)
        self.dispatcher = Dispatcher(device, Scheduler(costs or CostModel(), is_shared))
        self._served = served
        self._shared = Shared(served.model, served.pool, device, self.dispatcher, self.memory)
        self._describe = describe
        self._backward_memory: BackwardMemory | None = None
        """Measured when it is asked for: hardly any server's first request is for gradients."""

    async def info(self, peer_id: PeerId) -> InfoReply:
        return self._describe()

    async def open_session(self, peer_id: PeerId, request: OpenSession) -> SpanSession:
        """A session with room for its first tokens, waited for if the client does. Raises `BadRequest`,
        `ServerBusy`."""
        served = self._served
        checks.check_model(request.model_id, served.model_id)
        checks.check_span(request.span, served.model.span)
        checks.check_adapter(request.adapter, served.model.adapter_ids)
        checks.check_open(request, max_length=served.max_length)
        with ExitStack() as held:
            held.enter_context(self.tunings.held(held_bytes(request.tuning)))
            tuning = await self._read_tuning(request)
            tenant = self.memory.come(request.batch_size, request.max_length, request.first_tokens, owner=peer_id)
            held.callback(self.memory.leave, tenant)
            if not tenant.is_inside:
                self.dispatcher.when_idle(self.memory.make_way)
            await self._get_in(tenant, request)
            session = SpanSession(self._shared, peer_id, request, tenant, tuning, max_position=served.max_length)
            session.held = held.pop_all()
            return session

    async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply:
        """The whole batch through the asked blocks, without a cache. Raises `BadRequest`, `ServerBusy`."""
        served, device = self._served, self._shared.device
        self._check_batch(request)
        with self.tunings.held(held_bytes(request.tuning)):
            tensors = await device.run(partial(BatchTensors, request, served.model, served.max_length))
            job = ForwardJob(self._shared, peer_id, request, tensors)
            try:
                reply: ForwardReply = await self.dispatcher.run(job)
            finally:
                job.close()
        return reply

    async def backward(self, peer_id: PeerId, request: Backward) -> BackwardReply:
        """The gradients of the whole batch, by computing it once more. Raises `BadRequest`, `ServerBusy`."""
        served, device = self._served, self._shared.device
        self._check_batch(request)
        checks.check_trains(served.model.can_train)
        with self.tunings.held(held_bytes(request.tuning)):
            trip = await device.run(partial(self._trip_size, request, self.dispatcher.costs.pass_tokens))
            tensors = await device.run(partial(BackwardTensors, request, served.model, served.max_length))
            job = BackwardJob(self._shared, peer_id, request, tensors, trip)
            reply: BackwardReply = await self.dispatcher.run(job)
        return reply

    def _check_batch(self, request: Forward | Backward) -> None:
        """Raises `BadRequest`."""
        served = self._served
        checks.check_model(request.model_id, served.model_id)
        checks.check_span(request.span, served.model.span)
        checks.check_adapter(request.adapter, served.model.adapter_ids)
        checks.check_hidden_size(request.hidden_states, served.model.hidden_size)
        checks.check_length(request.hidden_states, served.max_length)

    def _trip_size(self, request: Backward, pass_tokens: float) -> TripSize:
        """On the device: how the request's rows may go there and back. Raises `BadRequest`."""
        served, model = self._served, self._served.model
        if self._backward_memory is None:
            self._backward_memory = backward_memory(model)
        memory = self._backward_memory
        limit_bytes = served.training_bytes
        if limit_bytes is None:
            limit_bytes = memory.default_bytes(model.span.num_blocks)
        num_rows, num_tokens, _ = request.hidden_states.shape
        return trip_size(
            memory,
            limit_bytes,
            AskedRows(num_rows, num_tokens, request.span, request.tuning),
            max_length=served.max_length,
            pass_tokens=pass_tokens,
        )

    async def _read_tuning(self, request: OpenSession) -> SpanTuning | None:
        """Raises `BadRequest`."""
        if request.tuning is None:
            return None
        read = partial(read_tuning, request.tuning, request.span, self._served.model)
        return await self._shared.device.run(read)

    async def _get_in(self, tenant: Tenant, request: OpenSession) -> None:
        """Waits for room as long as the client does."""
        if not tenant.is_inside:
            is_in = trio.Event()
            tenant.get_in = is_in.set
            with trio.move_on_after(request.alloc_timeout_s):
                await is_in.wait()
        if not tenant.is_inside:
            memory, num_tokens = self.memory, request.batch_size * max(1, request.first_tokens)
            raise ServerBusy(
                f"no room for {num_tokens} tokens of KV cache within {request.alloc_timeout_s:g} s: "
                f"{memory.tokens_left} of {memory.total_tokens} are left, {memory.num_queued} sessions wait"
            )
