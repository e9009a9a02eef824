"""Servers that compute in the trio loop and take simulated time, one call after the other, and a client that trains.

With `autojump_clock` a test says to the second when a server dies or hangs.
"""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trio
from tiny_swarm import SPANS, FixedView, client_model, server_info
from tiny_training import Gradients

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.training import TrainingPass
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import BadRequest
from p2pswarm.core.ids import PeerId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.rpc.server import RpcServer
from p2pswarm.rpc.service import SessionService
from p2pswarm.testing.faulty_service import FaultyService
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import Backward, BackwardReply, Forward, ForwardReply, InfoReply, OpenSession
from p2pswarm.wire.tuning import TunedLayer, WireTuning

LATENCY_S = 0.01
FORWARD_S, BACKWARD_S = 1.0, 3.0


@dataclass(frozen=True)
class Work:
    """A call that a server has computed."""

    kind: type[Forward] | type[Backward]
    span: Span
    started_at_s: float
    ended_at_s: float


class InlineService:
    """A `rpc.service.RpcService` over a part of a model, whose device does one call at a time."""

    def __init__(self, info: ServerInfo, part: SpanModel) -> None:
        self.info_reply = InfoReply(info)
        self.part = part
        self.works: list[Work] = []
        self.num_inside = 0
        """Calls that are here now."""
        self.delay_s: Callable[[], float] = lambda: 0.0
        """How much longer than usual the next call takes."""
        self._device = trio.StrictFIFOLock()

    async def info(self, peer_id: PeerId) -> InfoReply:
        return self.info_reply

    async def open_session(self, peer_id: PeerId, request: OpenSession) -> SessionService:
        raise BadRequest("this server only trains")

    async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply:
        async with self._computing(request, FORWARD_S):
            states, options = self._decoded(request)
            output = self.part.run(states, None, position=0, **options)
            return ForwardReply(encode_tensor(output.to(states.dtype), request.codec))

    async def backward(self, peer_id: PeerId, request: Backward) -> BackwardReply:
        async with self._computing(request, BACKWARD_S):
            states, options = self._decoded(request)
            gradients = self.part.run_backward(states, decode_tensor(request.grad_outputs), **options)
            return BackwardReply(
                encode_tensor(gradients.inputs.to(states.dtype), request.codec), _as_wire(gradients.tuning)
            )

    @asynccontextmanager
    async def _computing(self, request: Forward | Backward, work_s: float) -> AsyncIterator[None]:
        self.num_inside += 1
        try:
            async with self._device:
                started_at_s = trio.current_time()
                await trio.sleep(work_s + self.delay_s())
                self.works.append(Work(type(request), request.span, started_at_s, trio.current_time()))
                yield
        finally:
            self.num_inside -= 1

    def _decoded(self, request: Forward | Backward) -> tuple[torch.Tensor, dict[str, Any]]:
        if not self.part.span.contains(request.span):
            raise BadRequest(f"this server has blocks {self.part.span}, asked were {request.span}")
        mask, position_ids = request.attention_mask, request.position_ids
        options = {
            "attention_mask": None if mask is None else decode_tensor(mask),
            "position_ids": None if position_ids is None else decode_tensor(position_ids),
            "blocks": request.span,
            "tuning": _as_span_tuning(request.span, request.tuning),
        }
        return decode_tensor(request.hidden_states), options


def _as_span_tuning(span: Span, wire: WireTuning | None) -> SpanTuning | None:
    if wire is None:
        return None
    layers: dict[int, dict[str, LowRank]] = {}
    for layer in wire.layers:
        layers.setdefault(layer.block, {})[layer.path] = LowRank(decode_tensor(layer.down), decode_tensor(layer.up))
    return SpanTuning(span, None if wire.prompts is None else decode_tensor(wire.prompts), layers)


def _as_wire(tuning: SpanTuning | None) -> WireTuning | None:
    if tuning is None or (tuning.prompts is None and not tuning.layers):
        return None
    layers = [
        TunedLayer(index, path, encode_tensor(pair.down), encode_tensor(pair.up))
        for index, pairs in sorted(tuning.layers.items())
        for path, pair in sorted(pairs.items())
    ]
    return WireTuning(None if tuning.prompts is None else encode_tensor(tuning.prompts), tuple(layers))


@dataclass
class TrainingWorld:
    """What a test can look at and break."""

    memory: MemoryNetwork
    model: DistributedModel
    view: FixedView
    services: dict[PeerId, InlineService]
    faults: dict[PeerId, FaultyService]

    @property
    def training(self) -> TrainingPass:
        return self.model.dispatch.forward_pass.training

    def peers_of(self, span: Span) -> list[PeerId]:
        return [peer_id for peer_id, info in self.view.servers.items() if info.span == span]

    def works(self, kind: type[Forward] | type[Backward]) -> list[Work]:
        """Of all servers, in the order in which they were begun."""
        works = [work for service in self.services.values() for work in service.works if work.kind is kind]
        return sorted(works, key=lambda work: work.started_at_s)

    async def step(self, states: torch.Tensor, weights: torch.Tensor, tuning: Tuning | None = None) -> Gradients:
        """Forward and backward, as torch would have them called."""
        output, trail = await self.training.forward(StepInput(states, 0), tuning)
        inputs, of_tuning = await self.training.backward(trail, weights)
        return Gradients(output, inputs, () if of_tuning is None else of_tuning.tensors)


@asynccontextmanager
async def open_training_world(
    checkpoint: Checkpoint,
    load_part: Callable[[Span], SpanModel],
    spans: Sequence[Span] = SPANS,
    config: ClientConfig | None = None,
    latency_s: float = LATENCY_S,
) -> AsyncIterator[TrainingWorld]:
    """One server for each span, and a client."""
    memory = MemoryNetwork(random.Random(5), Link(latency_s=latency_s))
    view = FixedView()
    services: dict[PeerId, InlineService] = {}
    faults: dict[PeerId, FaultyService] = {}
    async with AsyncExitStack() as stack:
        networks = [await stack.enter_async_context(memory.node(number + 1)) for number in range(len(spans))]
        client = await stack.enter_async_context(memory.node(100, listens=False))
        nursery = await stack.enter_async_context(open_transparent_nursery())
        for network, span in zip(networks, spans, strict=True):
            info = server_info(network, checkpoint, load_part(span))
            view.servers[network.peer_id] = info
            services[network.peer_id] = InlineService(info, load_part(span))
            faults[network.peer_id] = FaultyService(services[network.peer_id])
            await nursery.start(RpcServer(network, faults[network.peer_id]).run)
        model = client_model(checkpoint, client, view, config or ClientConfig(known_peers_path=None))
        yield TrainingWorld(memory, model, view, services, faults)
        nursery.cancel_scope.cancel()
