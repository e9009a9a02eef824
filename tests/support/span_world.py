"""A server of blocks 2:6 of the tiny model over a `MemoryNetwork`, and whoever asks it something."""

import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.core.ids import ModelId, SessionId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.span import Span
from p2pswarm.net.network import Network
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.memory_network import MemoryNetwork
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import Backward, BackwardReply, Forward, InfoReply, OpenSession, Step
from swarmd.device_thread import InlineDevice
from swarmd.handler import Served, SpanService

SPAN = Span(2, 6)
HIDDEN_SIZE = 64
TIMEOUT_S = 30.0
STEP_IDS = itertools.count()


@dataclass
class SpanWorld:
    """Made by `open_span_world`."""

    memory: MemoryNetwork
    server: Network
    rpc: RpcServer
    service: SpanService
    served: Served
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def model_id(self) -> ModelId:
        return self.served.model_id

    @property
    def model(self) -> SpanModel:
        return self.served.model

    @asynccontextmanager
    async def client(self, seed: int = 2) -> AsyncIterator[RpcClient]:
        async with self.memory.node(seed, listens=False) as network:
            await network.connect(self.server.addresses[0])
            client = RpcClient(network)
            yield client
            client.close()

    def session(self, client: RpcClient, **changes: Any) -> AbstractAsyncContextManager[RemoteSession]:
        name = SessionId(f"session-{next(self._numbers)}")
        request = OpenSession(name, self.model_id, SPAN, max_length=32, batch_size=1)
        return client.open_session(self.server.peer_id, replace(request, **changes), TIMEOUT_S)

    async def forward(self, client: RpcClient, hidden_states: torch.Tensor, **changes: Any) -> torch.Tensor:
        request = replace(Forward(self.model_id, SPAN, encode_tensor(hidden_states)), **changes)
        return decode_tensor((await client.forward(self.server.peer_id, request, TIMEOUT_S)).hidden_states)

    def backward_request(self, states: torch.Tensor, gradients: torch.Tensor, **more: Any) -> Backward:
        return Backward(self.model_id, SPAN, encode_tensor(states), encode_tensor(gradients), **more)

    async def backward(self, client: RpcClient, request: Backward) -> BackwardReply:
        return await client.backward(self.server.peer_id, request, TIMEOUT_S)


@asynccontextmanager
async def open_span_world(
    served: Served, describe: Callable[[SpanWorld], InfoReply] | None = None
) -> AsyncIterator[SpanWorld]:
    """A server that computes in the loop's own thread. `describe`: what it tells of itself, where it is asked."""
    memory = MemoryNetwork(random.Random(7))

    def information() -> InfoReply:
        assert describe is not None, "nobody asks here"
        return describe(world)

    async with memory.node(1) as network, open_transparent_nursery() as nursery:
        service = SpanService(served, InlineDevice(), information)
        rpc = RpcServer(network, service)
        await nursery.start(rpc.run)
        world = SpanWorld(memory, network, rpc, service, served)
        yield world
        nursery.cancel_scope.cancel()


def step_of(hidden_states: torch.Tensor, position: int, **more: torch.Tensor) -> Step:
    """With an id that no other step has."""
    parts = {name: encode_tensor(part) for name, part in more.items()}
    return Step(next(STEP_IDS), position, encode_tensor(hidden_states), **parts)


async def run_step(
    session: RemoteSession, hidden_states: torch.Tensor, position: int, **more: torch.Tensor
) -> torch.Tensor:
    reply = await session.step(step_of(hidden_states, position, **more), TIMEOUT_S)
    return decode_tensor(reply.hidden_states)
