"""Servers that choose their blocks and move by themselves: the real life of a server, over a `MemoryNetwork` and a DHT,
with blocks that count instead of weights, and loads that take simulated time.
"""

import random
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import Any

import trio
from fixed_reach import FixedReach

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.model_servers import ModelFacts, ModelServers
from p2pswarm.client.session import Session
from p2pswarm.core.errors import SwarmingError
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.contact import Contact
from p2pswarm.dht.node import DhtNode
from p2pswarm.directory.announcer import Announcer, AnnouncerConfig
from p2pswarm.directory.directory import Directory
from p2pswarm.placement.rebalancing import should_move
from p2pswarm.routing.dstar_planner import DStarLitePlanner
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.arithmetic_model import ARITHMETIC_MODEL, HIDDEN_SIZE, ArithmeticService, arithmetic_server_info
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.testing.memory_node import MemoryNode
from p2pswarm.testing.simulated_clock import SimulatedClock
from swarmd.balancing import Balancing, Decide
from swarmd.block_taking import take_worst_served
from swarmd.lookout import Lookout
from swarmd.presence import Presence
from swarmd.probe import probe
from swarmd.served_span import CurrentSpan, ServedSpan
from swarmd.span_life import SpanLife
from swarmd.surroundings import Surroundings

LATENCY_S = 0.02
CLIENT_NUMBER = 1 << 40
LOADING_S = 8.0
PERIOD_S = 30.0
GRACE_S = 10.0
QUALITY = 0.75


@dataclass
class FixedFigures:
    """Room and waiting that never change."""

    total_tokens: int = 1 << 20
    tokens_left: int = 1 << 20
    queue_delay_s: float = 0.0


class Board:
    """Stands in for the DHT and the directory on it, at a hundredth of the cost: announcements that all can read.

    What a server that was killed announced last stays for as long as it would there.
    """

    def __init__(self) -> None:
        self.announced: dict[PeerId, ServerInfo] = {}
        self._gone_at_s: dict[PeerId, float] = {}

    @property
    def num_contacts(self) -> int:
        return len(self.announced)

    def known_contacts(self) -> list[Contact]:
        return []

    async def announce(self, info: ServerInfo) -> int:
        await trio.sleep(2 * LATENCY_S)
        self.announced[info.peer_id] = info
        return 1

    def withdraw(self, peer_id: PeerId) -> None:
        self.announced.pop(peer_id, None)

    def note_death(self, peer_id: PeerId) -> None:
        self._gone_at_s[peer_id] = trio.current_time() + AnnouncerConfig().lifetime_s

    async def servers(self, model_id: ModelId) -> Mapping[PeerId, ServerInfo]:
        await trio.sleep(2 * LATENCY_S)
        return self.now()

    def now(self) -> Mapping[PeerId, ServerInfo]:
        now_s = trio.current_time()
        return {peer_id: info for peer_id, info in self.announced.items() if now_s < self._gone_at_s.get(peer_id, inf)}

    def view(self, model_id: ModelId) -> "BoardView":
        return BoardView(self)

    @asynccontextmanager
    async def watch(self, model_id: ModelId, period_s: float) -> AsyncIterator["BoardView"]:
        view = self.view(model_id)
        async with open_transparent_nursery() as nursery:
            nursery.start_soon(view.run, period_s)
            yield view
            nursery.cancel_scope.cancel()


class BoardView:
    """What was on the board when it was last looked at."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self.servers = board.now()

    async def refresh(self) -> None:
        await trio.sleep(2 * LATENCY_S)
        self.servers = self._board.now()

    async def run(self, period_s: float) -> None:
        while True:
            await trio.sleep(period_s)
            await self.refresh()


@dataclass
class CountingLoader:
    """Loads blocks that count. What goes wrong with them is set by the test."""

    throughput_tokens_per_s: float
    loading_s: float = LOADING_S
    failures: dict[Span, Exception] = field(default_factory=dict)
    """What loading these blocks raises."""
    loaded: list[Span] = field(default_factory=list)
    services: list[ArithmeticService] = field(default_factory=list)
    is_stuck: bool = False
    """Whether nothing that is asked of the device is ever answered."""

    async def load(self, info: ServerInfo) -> ServedSpan:
        await trio.sleep(self.loading_s)
        if info.span in self.failures:
            raise self.failures[info.span]
        online = replace(
            arithmetic_server_info(info.peer_id, info.span, num_model_blocks=info.num_model_blocks),
            addresses=info.addresses,
            throughput_tokens_per_s=self.throughput_tokens_per_s,
        )
        service = ArithmeticService(online)
        self.loaded.append(info.span)
        self.services.append(service)
        figures = FixedFigures()
        return ServedSpan(service, online, figures, figures, lambda info: info, partial(self._probe, service, online))

    async def _probe(self, service: ArithmeticService, info: ServerInfo) -> None:
        if self.is_stuck:
            await trio.sleep_forever()
        await probe(service, info, HIDDEN_SIZE)

    async def free(self) -> None:
        if self.is_stuck:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()


def _unchanged(info: ServerInfo) -> ServerInfo:
    """Speeds that no later measurement corrects."""
    return info


@dataclass(frozen=True, slots=True)
class Event:
    """What a server told, and when."""

    at_s: float
    server: int
    name: str
    fields: dict[str, Any]


@dataclass(eq=False)
class MovingServer:
    """One server, as long as it lives."""

    number: int
    node: MemoryNode
    presence: Presence
    rpc: RpcServer
    life: SpanLife
    loader: CountingLoader
    stopped: trio.Event = field(default_factory=trio.Event)
    failure: SwarmingError | None = None
    """What ended it, if it ended by itself."""

    @property
    def info(self) -> ServerInfo:
        return self.presence.info

    @property
    def span(self) -> Span:
        return self.info.span

    @property
    def is_serving(self) -> bool:
        return self.info.state is ServerState.ONLINE


class MovingSwarm:
    """Made by `open_moving_swarm`."""

    def __init__(self, num_blocks: int, period_s: float, seed: int, board: Board | None, tasks: trio.Nursery) -> None:
        self.num_blocks = num_blocks
        self.period_s = period_s
        self.random = random.Random(seed)
        self.memory = MemoryNetwork(random.Random(seed), Link(latency_s=LATENCY_S))
        self.clock = SimulatedClock()
        self.board = board
        """None: a real DHT."""
        self.servers: list[MovingServer] = []
        """Those that live."""
        self.events: list[Event] = []
        self._tasks = tasks
        self._next_number = 1

    async def start(
        self, num_blocks: int, throughput_tokens_per_s: float = 100.0, *, decide: Decide | None = None
    ) -> MovingServer:
        """A new server; returns when it is ready."""
        loader = CountingLoader(throughput_tokens_per_s)
        number, self._next_number = self._next_number, self._next_number + 1
        server: MovingServer = await self._tasks.start(self._live, number, num_blocks, loader, decide)
        return server

    async def _live(
        self,
        number: int,
        num_blocks: int,
        loader: CountingLoader,
        decide: Decide | None,
        *,
        task_status: trio.TaskStatus[MovingServer],
    ) -> None:
        async with self.memory.node(number) as node, open_transparent_nursery() as nursery:
            dht: Any = self.board
            announcer: Any = self.board
            directory: Any = self.board
            if self.board is None:
                dht = await self._join(node, nursery, DhtConfig())
                directory = Directory(dht, self.clock, self.random)
                announcer = Announcer(dht, node, self.clock, self.random)
                nursery.start_soon(announcer.run)

            def tell(event: str, **fields: object) -> None:
                self.events.append(Event(trio.current_time(), number, event, fields))

            reach = FixedReach()
            around = Surroundings(
                node, dht, reach, announcer, directory, RpcClient(node), self.clock, self.random, tell
            )
            info = arithmetic_server_info(node.peer_id, Span(0, num_blocks), num_model_blocks=self.num_blocks)
            info = replace(info, state=ServerState.JOINING, addresses=node.addresses, throughput_tokens_per_s=0.0)
            presence = Presence(announcer, info, reach)
            current = CurrentSpan(presence, dht)
            rpc = RpcServer(node, current)
            await nursery.start(rpc.run)
            lookout = Lookout(info, around.directory, node, around.calls, self.random)
            if decide is None:
                decide = partial(should_move, balance_quality=QUALITY)
            balancing = Balancing(presence, lookout.others, decide, self.random, self.period_s)
            life = SpanLife(around, presence, current, rpc, loader, balancing, grace_period_s=GRACE_S)
            await take_worst_served(num_blocks, presence, around.directory)
            await life.begin()
            server = MovingServer(number, node, presence, rpc, life, loader)
            self.servers.append(server)
            task_status.started(server)
            try:
                async with open_transparent_nursery() as serving:
                    serving.start_soon(self._serve, server)
                    await server.stopped.wait()
                    serving.cancel_scope.cancel()
                if not node.is_running:
                    pass  # killed
                elif self.board is not None:
                    self.board.withdraw(node.peer_id)
                else:
                    await announcer.withdraw()
            finally:
                if server in self.servers:
                    self.servers.remove(server)
                nursery.cancel_scope.cancel()

    async def _serve(self, server: MovingServer) -> None:
        try:
            await server.life.serve()
        except SwarmingError as error:
            server.failure = error
            server.stopped.set()

    async def _join(self, node: MemoryNode, nursery: trio.Nursery, config: DhtConfig) -> DhtNode:
        dht = DhtNode(node, self.clock, self.random, config)
        await nursery.start(dht.run)
        await dht.bootstrap(self._some_addresses())
        return dht

    def _some_addresses(self) -> list[str]:
        return [address for server in self.servers[:3] for address in server.node.addresses]

    def kill(self, server: MovingServer) -> None:
        """As kill -9: its announcement stays."""
        self.memory.kill(server.node.peer_id)
        if self.board is not None:
            self.board.note_death(server.node.peer_id)
        self.servers.remove(server)
        server.stopped.set()

    def named(self, *names: str) -> list[Event]:
        return [event for event in self.events if event.name in names]

    def num_holders(self) -> list[int]:
        """Of each block: servers that live and answer requests for it."""
        spans = [server.span for server in self.servers if server.is_serving]
        return [sum(span.covers(block) for span in spans) for block in range(self.num_blocks)]

    def throughputs(self) -> list[float]:
        """Of each block, by those who answer requests for it."""
        serving = [server for server in self.servers if server.is_serving]
        return [
            sum(server.loader.throughput_tokens_per_s for server in serving if server.span.covers(block))
            for block in range(self.num_blocks)
        ]

    @asynccontextmanager
    async def session(self, max_length: int, config: ClientConfig | None = None) -> AsyncIterator[Session]:
        """Of a client that finds its servers in the directory."""
        config = config or ClientConfig(known_peers_path=None)
        async with (
            self.memory.node(CLIENT_NUMBER, listens=False) as node,
            open_transparent_nursery() as nursery,
        ):
            directory: Any = self.board
            if self.board is None:
                dht = await self._join(node, nursery, DhtConfig(serve=False))
                directory = Directory(dht, self.clock, self.random)
            rpc = RpcClient(node)
            facts = ModelFacts(ARITHMETIC_MODEL, self.num_blocks, HIDDEN_SIZE)
            async with directory.watch(ARITHMETIC_MODEL, config.update_period_s) as view:
                servers = ModelServers(facts, view, DStarLitePlanner(config.costs), node, rpc, config)
                session = Session(servers, rpc, config, max_length=max_length, nursery=nursery)
                try:
                    yield session
                finally:
                    session.close()
                    rpc.close()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_moving_swarm(
    num_model_blocks: int,
    servers: Iterable[int] = (),
    *,
    period_s: float = PERIOD_S,
    seed: int = 0,
    with_dht: bool = False,
) -> AsyncIterator[MovingSwarm]:
    """Servers that hold so many blocks each, which came one after the other."""
    async with open_transparent_nursery() as tasks:
        swarm = MovingSwarm(num_model_blocks, period_s, seed, None if with_dht else Board(), tasks)
        for num_blocks in servers:
            await swarm.start(num_blocks)
        yield swarm
        tasks.cancel_scope.cancel()
