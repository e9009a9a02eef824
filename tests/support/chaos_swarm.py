"""A swarm that a test can break in every way: servers that come, go, hang and lie over a `MemoryNetwork`, and a client.

On a simulated clock, so everything runs in one thread. Knows nothing of when to break what: that is `chaos_driver.py`.
"""

import random
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import trio

from p2pswarm.blocks.page_tables import pages_for
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.model_servers import ModelFacts, ModelServers
from p2pswarm.client.session import Session
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.net.network import Network, Stream, StreamHandler
from p2pswarm.routing.dstar_planner import DStarLitePlanner
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.server import RpcServer
from p2pswarm.rpc.service import RpcService
from p2pswarm.testing.arithmetic_model import (
    ARITHMETIC_MODEL,
    HIDDEN_SIZE,
    ArithmeticService,
    arithmetic_server_info,
)
from p2pswarm.testing.faulty_service import FaultyService
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.testing.memory_node import MemoryNode
from p2pswarm.wire.messages import InfoReply
from swarmd.device_thread import InlineDevice
from swarmd.handler import Served, SpanService

NUM_BLOCKS = 8
LATENCY_S = 0.025
CLIENT_NUMBER = 1 << 40
UPDATE_PERIOD_S = 30.0
"""How often the client hears who serves, if it does not ask."""
CACHE_TOKENS = 4000
GARBAGE = b"HTTP/1.1 400 Bad Request\r\n\r\n"


@dataclass(frozen=True)
class ServedModel:
    """What the swarm serves."""

    facts: ModelFacts
    make_service: Callable[[ServerInfo], RpcService]
    describe: Callable[[PeerId, Span], ServerInfo]
    """Its announcement, without addresses."""


def arithmetic_model(*, delay_s: float = 0.0, max_sessions: int = 1000) -> ServedModel:
    """Cheap: thousands of steps take seconds."""
    return ServedModel(
        ModelFacts(ARITHMETIC_MODEL, NUM_BLOCKS, HIDDEN_SIZE),
        partial(ArithmeticService, delay_s=delay_s, max_sessions=max_sessions),
        partial(arithmetic_server_info, num_model_blocks=NUM_BLOCKS),
    )


def torch_model(checkpoint: Checkpoint, load_part: Callable[[Span], SpanModel], *, max_length: int) -> ServedModel:
    """The real server code over a tiny real model."""
    hidden_size: Any = checkpoint.config.hidden_size

    def make_service(info: ServerInfo) -> SpanService:
        model = load_part(info.span)
        served = Served(info.model_id, model, model.new_pool(pages_for(CACHE_TOKENS)), max_length)
        return SpanService(served, InlineDevice(), lambda: InfoReply(info))

    def describe(peer_id: PeerId, span: Span) -> ServerInfo:
        info = arithmetic_server_info(peer_id, span, num_model_blocks=checkpoint.num_blocks)
        return replace(info, model_id=checkpoint.model_id, cache_tokens_left=CACHE_TOKENS, max_length=max_length)

    return ServedModel(ModelFacts(checkpoint.model_id, checkpoint.num_blocks, hidden_size), make_service, describe)


class Garbler:
    """A network whose streams, once `is_on`, say things that are no messages."""

    def __init__(self, network: Network) -> None:
        self.is_on = False
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def serve(self, protocol: ProtocolId, handler: StreamHandler) -> None:
        async def handle(stream: Stream) -> None:
            await handler(GarbledStream(stream, self))

        self._network.serve(protocol, handle)


class GarbledStream:
    """A stream of such a network."""

    def __init__(self, stream: Stream, garbler: Garbler) -> None:
        self._stream = stream
        self._garbler = garbler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def write(self, *buffers: Any) -> None:
        await self._stream.write(*([GARBAGE] if self._garbler.is_on else buffers))


@dataclass(eq=False)
class Server:
    """One of the swarm, as long as it lives."""

    number: int
    node: MemoryNode
    info: ServerInfo
    """What it announces while it is well."""
    service: FaultyService
    garbler: Garbler
    rpc: RpcServer
    stopped: trio.Event = field(default_factory=trio.Event)
    """Set when its process ends."""

    @property
    def peer_id(self) -> PeerId:
        return self.node.peer_id

    @property
    def span(self) -> Span:
        return self.info.span

    def holds_nothing(self) -> bool:
        """Whether no session and no request of anybody is left here."""
        statistics = self.rpc.statistics()
        return (statistics.num_sessions, statistics.num_busy, statistics.received_bytes) == (0, 0, 0)

    def __str__(self) -> str:
        return f"server {self.number} ({self.span})"


@dataclass
class LaggingView:
    """What the client knows of the servers: what was announced when it last asked."""

    announced: dict[PeerId, ServerInfo] = field(default_factory=dict)
    servers: dict[PeerId, ServerInfo] = field(default_factory=dict)

    async def refresh(self) -> None:
        await trio.sleep(2 * LATENCY_S)
        self.servers = dict(self.announced)

    async def run(self) -> None:
        while True:
            await self.refresh()
            await trio.sleep(UPDATE_PERIOD_S)


class ChaosSwarm:
    """Servers and one client. Made by `open_chaos_swarm`."""

    def __init__(
        self, model: ServedModel, memory: MemoryNetwork, network: MemoryNode, config: ClientConfig, tasks: trio.Nursery
    ) -> None:
        self.model = model
        self.memory = memory
        self.network = network
        self.view = LaggingView()
        self.servers: dict[PeerId, Server] = {}
        """Those whose process runs."""
        self.ended: list[Server] = []
        self.rpc = RpcClient(network)
        self.planner = DStarLitePlanner(config.costs)
        self.client = ModelServers(model.facts, self.view, self.planner, network, self.rpc, config)
        self._config = config
        self._tasks = tasks
        self._next_number = 1

    async def start(self, span: Span, number: int | None = None) -> Server:
        """A new server, announced; with the `number` of one that has ended, the same peer at another address."""
        if number is None:
            number, self._next_number = self._next_number, self._next_number + 1
        server: Server = await self._tasks.start(self._run_server, span, number)
        return server

    async def _run_server(self, span: Span, number: int, *, task_status: trio.TaskStatus[Server]) -> None:
        async with self.memory.node(number) as node, trio.open_nursery() as tasks:
            garbler = Garbler(node)
            info = replace(self.model.describe(node.peer_id, span), addresses=node.addresses)
            service = FaultyService(self.model.make_service(info))
            server = Server(number, node, info, service, garbler, RpcServer(garbler, service))
            await tasks.start(server.rpc.run)
            self.servers[node.peer_id] = server
            self.view.announced[node.peer_id] = info
            task_status.started(server)
            await server.stopped.wait()
            tasks.cancel_scope.cancel()

    def kill(self, server: Server) -> None:
        """As kill -9: its announcement stays."""
        self.memory.kill(server.peer_id)
        self._forget(server)

    async def drain(self, server: Server, grace_s: float) -> None:
        """The server leaves in order, and says so."""
        self.view.announced[server.peer_id] = replace(server.info, state=ServerState.DRAINING)
        await server.rpc.drain(grace_s)
        if server.peer_id in self.servers:  # nobody killed it meanwhile
            del self.view.announced[server.peer_id]
            self._forget(server)

    def _forget(self, server: Server) -> None:
        del self.servers[server.peer_id]
        self.ended.append(server)
        server.stopped.set()

    def cut_off(self, servers: Collection[Server]) -> None:
        """From now on just these cannot be reached by anybody but one another."""
        self.memory.partition([[server.peer_id for server in servers]])

    @asynccontextmanager
    async def session(self, max_length: int) -> AsyncIterator[Session]:
        """What `DistributedModel.session` makes, for hidden states only."""
        async with open_transparent_nursery() as nursery:
            session = Session(self.client, self.rpc, self._config, max_length=max_length, nursery=nursery)
            try:
                yield session
            finally:
                session.close()
                nursery.cancel_scope.cancel()

    def serving(self, session: Session) -> list[Server]:
        """The living servers on the session's route."""
        hops = session.route.hops if session.route is not None else ()
        return [self.servers[hop.peer_id] for hop in hops if hop.peer_id in self.servers]

    async def until_quiet(self, timeout_s: float = 30.0) -> None:
        """Waits until no server that lives holds anything any more; fails after `timeout_s`."""
        with trio.fail_after(timeout_s):
            while not all(server.holds_nothing() for server in self.servers.values()):  # noqa: ASYNC110
                await trio.sleep(0.1)


@asynccontextmanager
async def open_chaos_swarm(
    spans: Collection[Span],
    model: ServedModel | None = None,
    config: ClientConfig | None = None,
    seed: int = 0,
) -> AsyncIterator[ChaosSwarm]:
    """One server for each span, and a client that has measured how far away they are."""
    config = config or ClientConfig(known_peers_path=None)
    memory = MemoryNetwork(random.Random(seed), Link(latency_s=LATENCY_S))
    async with open_transparent_nursery() as tasks, memory.node(CLIENT_NUMBER, listens=False) as network:
        swarm = ChaosSwarm(model or arithmetic_model(), memory, network, config, tasks)
        for span in spans:
            await swarm.start(span)
        await swarm.view.refresh()
        tasks.start_soon(swarm.view.run)
        await swarm.client.measure_round_trips()
        try:
            yield swarm
        finally:
            swarm.rpc.close()
            tasks.cancel_scope.cancel()
