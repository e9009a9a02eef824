"""The simulated swarm, and the real client that uses it: `p2pswarm.client` over `MemoryNetwork`."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random

import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.forward import ForwardPass
from p2pswarm.client.model_servers import ModelFacts, ModelServers
from p2pswarm.client.session import Session
from p2pswarm.core.ids import PeerId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.routing.bans import BanList
from p2pswarm.routing.dstar_planner import DStarLitePlanner
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from simulations.churn.servers import MODEL_ID, StageService
from simulations.churn.setting import HIDDEN_SIZE, NUM_BLOCKS, STAGES, Setting


@dataclass
class Announced:
    """All servers, always: who fails is for the client to find out."""

    servers: dict[PeerId, ServerInfo] = field(default_factory=dict)

    async def refresh(self) -> None:
        """There is never any news."""


@dataclass
class World:
    """A client among its servers."""

    services: list[StageService]
    servers: ModelServers
    rpc: RpcClient
    config: ClientConfig
    nursery: trio.Nursery

    @property
    def num_failures(self) -> int:
        """Hand-overs that failed so far."""
        return sum(service.num_failures for service in self.services)

    def session(self, max_length: int) -> Session:
        """As `DistributedModel.session` makes it. Close it."""
        return Session(self.servers, self.rpc, self.config, max_length=max_length, nursery=self.nursery)

    def forward_pass(self) -> ForwardPass:
        return ForwardPass(self.servers, self.rpc, self.config)


@asynccontextmanager
async def open_world(setting: Setting, failure_rate: float, seed: int, config: ClientConfig) -> AsyncIterator[World]:
    """`setting.num_replicas` servers for each stage, and a client that knows them all."""
    link = Link(setting.latency_s, setting.simulated_bandwidth_bytes_per_s)
    memory = MemoryNetwork(Random(seed), link)
    spans = STAGES * setting.num_replicas
    async with AsyncExitStack() as stack:
        networks = [await stack.enter_async_context(memory.node(number)) for number in range(1, len(spans) + 1)]
        client_network = await stack.enter_async_context(memory.node(len(spans) + 1, listens=False))
        nursery = await stack.enter_async_context(open_transparent_nursery())
        services: list[StageService] = []
        for network, span in zip(networks, spans, strict=True):
            randomness = Random(f"{seed}, server {len(services)}")
            services.append(StageService(network, span, setting, failure_rate, randomness))
            await nursery.start(RpcServer(network, services[-1]).run)
        rpc = RpcClient(client_network)
        facts = ModelFacts(MODEL_ID, NUM_BLOCKS, HIDDEN_SIZE)
        planner = DStarLitePlanner(config.costs, bans=BanList(config.ban_s), random=Random(seed))
        servers = ModelServers(facts, _announced(services, link), planner, client_network, rpc, config)
        await servers.measure_round_trips()
        yield World(services, servers, rpc, config, nursery)
        rpc.close()
        nursery.cancel_scope.cancel()


def _announced(services: Sequence[StageService], link: Link) -> Announced:
    """What the servers say of themselves, and of how far they are from each other."""
    round_trips_s = {service.peer_id: link.round_trip_s for service in services}
    return Announced(
        {service.peer_id: replace(service.announcement(), next_rtts_s=round_trips_s) for service in services}
    )
