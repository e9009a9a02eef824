"""A tiny model in a swarm of in-memory nodes: real server code, real sessions, no sockets and no directory.

For the tests of the rooms above `rpc`; `conftest.py` files beside them make fixtures of it.
"""

import functools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from p2pswarm.blocks.architecture import Head
from p2pswarm.blocks.client_model import load_client_model
from p2pswarm.blocks.pages import PAGE_TOKENS
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.autograd import Call
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.dispatch import BlocksDispatch, calls_into_loop
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.forward import ForwardPass
from p2pswarm.client.local_blocks import LocalBlocks, load_local_blocks
from p2pswarm.client.model_servers import ModelFacts, ModelServers
from p2pswarm.core.ids import PeerId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.net.network import Network
from p2pswarm.routing.bans import BanList
from p2pswarm.routing.dstar_planner import DStarLitePlanner
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.wire.messages import InfoReply
from swarmd.device_thread import open_device_thread
from swarmd.handler import Served, SpanService

CACHE_TOKENS = 32 * PAGE_TOKENS
MAX_LENGTH = 200
NUM_LABELS = 3
LATENCY_S = 0.0005
"""As on one machine: tests of threads need a real clock."""
SPANS = (Span(0, 3), Span(3, 4), Span(4, 8))


@dataclass
class FixedView:
    """Who serves the model, as the test says."""

    servers: dict[PeerId, ServerInfo] = field(default_factory=dict)
    num_refreshed: int = 0

    async def refresh(self) -> None:
        self.num_refreshed += 1


@dataclass
class TinySwarm:
    """What a test can look at and break."""

    memory: MemoryNetwork
    model: DistributedModel
    view: FixedView
    services: dict[PeerId, SpanService]

    def peer_of(self, span: Span) -> PeerId:
        return next(peer_id for peer_id, info in self.view.servers.items() if info.span == span)

    def all_room_is_free(self) -> bool:
        return all(service.memory.tokens_left == CACHE_TOKENS for service in self.services.values())


@asynccontextmanager
async def open_tiny_swarm(
    checkpoint: Checkpoint,
    load_part: Callable[[Span], SpanModel],
    spans: Sequence[Span] = SPANS,
    config: ClientConfig | None = None,
    call: Call | None = None,
    head: Head = Head.CAUSAL_LM,
) -> AsyncIterator[TinySwarm]:
    """One server for each span, and a client, whose model has that head (a classifier's is for three labels)."""
    config = config or ClientConfig(known_peers_path=None)
    async with AsyncExitStack() as stack:
        memory = MemoryNetwork(random.Random(5), Link(latency_s=LATENCY_S))
        view = FixedView()
        services: dict[PeerId, SpanService] = {}
        for number, span in enumerate(spans):
            network = await stack.enter_async_context(memory.node(number + 1))
            info, service = await stack.enter_async_context(serving(network, checkpoint, load_part(span)))
            view.servers[network.peer_id] = info
            services[network.peer_id] = service
        network = await stack.enter_async_context(memory.node(100, listens=False))
        yield TinySwarm(memory, client_model(checkpoint, network, view, config, call, head), view, services)


def server_info(network: Network, checkpoint: Checkpoint, part: SpanModel) -> ServerInfo:
    """What such a server would announce."""
    return ServerInfo(
        peer_id=network.peer_id,
        model_id=checkpoint.model_id,
        span=part.span,
        state=ServerState.ONLINE,
        addresses=network.addresses,
        num_model_blocks=checkpoint.num_blocks,
        throughput_tokens_per_s=100.0,
        inference_tokens_per_s=100.0,
        forward_tokens_per_s=100.0,
        network_tokens_per_s=100.0,
        dtype="float32",
        cache_tokens_left=CACHE_TOKENS,
        max_length=MAX_LENGTH,
        adapters=part.adapter_ids,
    )


@asynccontextmanager
async def serving(
    network: Network, checkpoint: Checkpoint, part: SpanModel
) -> AsyncIterator[tuple[ServerInfo, SpanService]]:
    """A server of the part, without announcing itself."""
    info = server_info(network, checkpoint, part)
    async with open_device_thread() as device, open_transparent_nursery() as nursery:
        served = Served(checkpoint.model_id, part, part.new_pool(CACHE_TOKENS // PAGE_TOKENS), MAX_LENGTH)
        service = SpanService(served, device, lambda: InfoReply(info))
        await nursery.start(RpcServer(network, service).run)
        yield info, service
        nursery.cancel_scope.cancel()


@functools.cache
def local_blocks_of(checkpoint: Checkpoint, num_blocks: int) -> LocalBlocks:
    """Loaded once: they know of no session."""
    return load_local_blocks(checkpoint, num_blocks, torch.float32)


def client_model(
    checkpoint: Checkpoint,
    network: Network,
    view: FixedView,
    config: ClientConfig,
    call: Call | None = None,
    head: Head = Head.CAUSAL_LM,
) -> DistributedModel:
    """What `Swarm.load` makes, over a fixed view."""
    rpc = RpcClient(network)
    hidden_size: Any = checkpoint.config.hidden_size
    facts = ModelFacts(checkpoint.model_id, checkpoint.num_blocks, hidden_size)
    planner = DStarLitePlanner(config.costs, bans=BanList(config.ban_s), random=random.Random(5))
    servers = ModelServers(facts, view, planner, network, rpc, config)
    local = local_blocks_of(checkpoint, config.local_blocks) if config.local_blocks else None
    forward_pass = ForwardPass(servers, rpc, config, local)
    dispatch = BlocksDispatch(forward_pass, call or calls_into_loop())
    num_labels = NUM_LABELS if head is Head.SEQUENCE_CLASSIFICATION else None
    shell = load_client_model(checkpoint, dispatch, head=head, num_labels=num_labels)
    return DistributedModel(checkpoint, shell, servers, forward_pass, dispatch, rpc, config, head=head, local=local)
