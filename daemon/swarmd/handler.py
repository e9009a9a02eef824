"""What this server answers: `RpcService` over one span of one model.

Decides what is refused (`swarmd/checks.py`) and who gets room (`swarmd/memory.py`), and hands the computing to the
device by way of the scheduler. Knows nothing of streams and deadlines: those are `rpc/server.py`'s. Read
`swarmd/span_session.py` next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from p2pswarm.blocks.kv_pool import KVPool
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.core.errors import BadRequest, ServerBusy
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.wire.messages import Backward, BackwardReply, Forward, ForwardReply, InfoReply, OpenSession
from swarmd import checks
from swarmd.device_thread import Device
from swarmd.forward_pass import ForwardJob, ForwardTensors
from swarmd.memory import KVMemory, Tenant
from swarmd.scheduling.costs import CostModel
from swarmd.scheduling.dispatcher import Dispatcher
from swarmd.scheduling.scheduler import Scheduler
from swarmd.span_session import Shared, SpanSession


@dataclass(frozen=True, slots=True)
class Served:
    """The part of the world that a handler serves."""

    model_id: ModelId
    model: SpanModel
    pool: KVPool
    """For the keys and values of all sessions."""
    max_length: int
    """Longest session, and longest sequence of a forward pass, in tokens."""


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
        self.dispatcher = Dispatcher(device, Scheduler(costs or CostModel(), is_shared))
        self._served = served
        self._shared = Shared(served.model, served.pool, device, self.dispatcher, self.memory)
        self._describe = describe

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
        checks.check_no_tuning(request.tuning)
        tenant = self.memory.come(request.batch_size, request.max_length, request.first_tokens)
        try:
            await self._get_in(tenant, request)
            return SpanSession(self._shared, peer_id, request, tenant, max_position=served.max_length)
        except BaseException:
            self.memory.leave(tenant)
            raise

    async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply:
        """The whole batch through the asked blocks, without a cache. Raises `BadRequest`, `ServerBusy`."""
        served = self._served
        checks.check_model(request.model_id, served.model_id)
        checks.check_span(request.span, served.model.span)
        checks.check_adapter(request.adapter, served.model.adapter_ids)
        checks.check_hidden_size(request.hidden_states, served.model.hidden_size)
        checks.check_no_tuning(request.tuning)
        num_tokens = request.hidden_states.shape[1]
        if not 1 <= num_tokens <= served.max_length:
            raise BadRequest(f"this server takes sequences of 1 to {served.max_length} tokens, got {num_tokens}")
        tensors = await self._shared.device.run(partial(ForwardTensors, request, served.max_length))
        job = ForwardJob(self._shared, peer_id, request, tensors)
        try:
            reply: ForwardReply = await self.dispatcher.run(job)
        finally:
            job.close()
        return reply

    async def backward(self, peer_id: PeerId, request: Backward) -> BackwardReply:
        """Raises `BadRequest`."""
        raise BadRequest("this server runs forward only", peer_id)

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
