"""All but sockets and processes: servers announce themselves in a DHT, a client finds them there and generates."""

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import trio
from tiny_swarm import serving

from p2pswarm.blocks.span_model import load_span
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.membership import join_over
from p2pswarm.client.swarm import Swarm
from p2pswarm.core.clock import SystemClock
from p2pswarm.core.errors import ConfigError, MissingBlocksError, ModelNotFound, NoPeersError
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerState
from p2pswarm.core.span import Span
from p2pswarm.dht.node import DhtNode
from p2pswarm.directory.announcer import Announcer
from p2pswarm.directory.directory import Directory
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

PROMPT = [5, 17, 99, 3, 42]
GREEDY = {"do_sample": False, "max_new_tokens": 8}
FIRST, MIDDLE, LAST = Span(0, 3), Span(3, 4), Span(4, 8)


@dataclass
class Server:
    """One that can be told what to announce."""

    announcer: Announcer
    address: str

    async def become(self, state: ServerState) -> None:
        assert self.announcer.info is not None
        await self.announcer.announce(replace(self.announcer.info, state=state))


@dataclass
class World:
    memory: MemoryNetwork
    servers: dict[Span, Server]

    @property
    def address(self) -> str:
        return next(iter(self.servers.values())).address

    @asynccontextmanager
    async def client(self, peers: list[str], config: ClientConfig | None = None) -> AsyncIterator[Swarm]:
        config = config or ClientConfig(known_peers_path=None, find_timeout_s=1.0, join_timeout_s=2.0)
        async with (
            self.memory.node(random.randrange(1000, 1 << 40), listens=False) as network,
            join_over(network, peers, config, SystemClock(), random.Random(1)) as membership,
        ):
            yield Swarm(membership)


@pytest.fixture(scope="module")
def load_part(tiny_llama):
    return {span: load_span(tiny_llama, span) for span in (FIRST, MIDDLE, LAST)}.__getitem__


@pytest.fixture
async def world(tiny_llama, load_part) -> AsyncIterator[World]:
    memory = MemoryNetwork(random.Random(3), Link(latency_s=0.0005))
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(open_transparent_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        opened = World(memory, {})
        for number, span in enumerate((FIRST, MIDDLE, LAST)):
            network = await stack.enter_async_context(memory.node(number + 1))
            info, _ = await stack.enter_async_context(serving(network, tiny_llama, load_part(span)))
            dht = DhtNode(network, SystemClock(), random.Random(number))
            await nursery.start(dht.run)
            await dht.bootstrap([opened.address] if opened.servers else [])
            announcer = Announcer(dht, network, SystemClock(), random.Random(number))
            nursery.start_soon(announcer.run)
            await announcer.announce(info)
            opened.servers[span] = Server(announcer, network.addresses[0])
        for server in opened.servers.values():
            await server.become(ServerState.ONLINE)  # the first ones announced when they were alone
        yield opened


def local_tokens(local) -> list[int]:
    return local.generate(torch.tensor([PROMPT]), **GREEDY)[0, len(PROMPT) :].tolist()


def folder_of(tiny_llama) -> str:
    return str(tiny_llama._config_folder)


async def test_model_is_found_by_any_one_peer_and_generates(world, tiny_llama, local) -> None:
    for server in world.servers.values():
        async with world.client([server.address]) as swarm:
            model = await swarm.load(folder_of(tiny_llama))
            async with model.session(max_length=32) as session:
                assert [token async for token in session.generate(PROMPT, **GREEDY)] == local_tokens(local)
                assert [hop.span for hop in session.route.hops] == [FIRST, MIDDLE, LAST]


async def test_client_keeps_the_blocks_that_it_is_told_to(world, tiny_llama, local) -> None:
    config = ClientConfig(known_peers_path=None, find_timeout_s=1.0, join_timeout_s=2.0, local_blocks=2)
    async with world.client([world.address], config) as swarm:
        model = await swarm.load(folder_of(tiny_llama))
        async with model.session(max_length=32) as session:
            assert [token async for token in session.generate(PROMPT, **GREEDY)] == local_tokens(local)
            assert [hop.span for hop in session.route.hops] == [Span(2, 3), MIDDLE, Span(4, 6)]
    with pytest.raises(ConfigError, match=r"local_blocks 4 are kept of each end .* of the 8 blocks"):
        async with world.client([world.address], replace(config, local_blocks=4)) as swarm:
            await swarm.load(folder_of(tiny_llama))


async def test_round_trips_are_measured_when_the_model_is_loaded(world, tiny_llama) -> None:
    async with world.client([world.address]) as swarm:
        model = await swarm.load(folder_of(tiny_llama))
        assert model.servers.round_trips_s().keys() == model.servers.online.keys()
        assert len(model.servers.online) == 3


async def test_server_that_leaves_is_missing_and_one_that_returns_is_used(world, tiny_llama, local) -> None:
    async with world.client([world.address]) as swarm:
        model = await swarm.load(folder_of(tiny_llama))
        await world.servers[MIDDLE].become(ServerState.DRAINING)
        await swarm.directory.servers(model.model_id)
        async with model.session(max_length=32) as session:
            await model.servers._view.refresh()
            with pytest.raises(MissingBlocksError, match=r"blocks 3:4 of 0:8; not usable: …\w+ 3:4 \(draining\)"):
                await session.complete(PROMPT, **GREEDY)
            await world.servers[MIDDLE].become(ServerState.ONLINE)
            assert (await session.complete(PROMPT, **GREEDY))[0, 5:].tolist() == local_tokens(local)


async def test_model_that_nobody_serves_is_named_beside_what_is_served(world, tmp_path: Path) -> None:
    other = save_tiny_checkpoint(tmp_path / "other", "llama", seed=5)
    async with world.client([world.address]) as swarm:
        with pytest.raises(ModelNotFound, match=r"nobody serves other@\w+; announced are tiny-llama@\w+"):
            await swarm.load(str(other))


async def test_peer_that_is_gone_is_named(world) -> None:
    world.memory.kill(world.servers[FIRST].announcer.info.peer_id)
    with pytest.raises(NoPeersError, match="known peers"):
        async with world.client([world.address]):
            raise AssertionError("joined a swarm through a dead peer")


async def test_newcomer_who_knows_nobody_is_told_what_is_missing(world) -> None:
    with pytest.raises(NoPeersError, match="no peer was given"):
        async with world.client([]):
            raise AssertionError("joined a swarm without peers")


async def test_client_finds_the_swarm_again_when_its_first_peer_has_gone(world, tiny_llama, tmp_path: Path) -> None:
    config = ClientConfig(known_peers_path=tmp_path / "peers.json", find_timeout_s=1.0, join_timeout_s=5.0)
    async with world.client([world.address], config) as swarm:
        await swarm.load(folder_of(tiny_llama))
    world.memory.kill(world.servers[FIRST].announcer.info.peer_id)
    async with world.client([], config) as swarm:
        model = await swarm.load(folder_of(tiny_llama))
        assert model.servers.known


async def test_errors_of_the_users_code_come_out_as_they_are(world) -> None:
    with pytest.raises(KeyError):
        async with world.client([world.address]):
            raise KeyError("mine")


async def test_directory_lists_the_model(world, tiny_llama) -> None:
    async with world.client([world.address]) as swarm:
        (summary,) = (await swarm.directory.models()).values()
        assert (summary.model_id, summary.num_blocks, summary.num_servers) == (tiny_llama.model_id, 8, 3)
        servers = await Directory(swarm.membership.dht, SystemClock()).servers(summary.model_id)
        assert sorted(info.span for info in servers.values()) == [FIRST, MIDDLE, LAST]


async def test_many_clients_at_once(world, tiny_llama, local) -> None:
    results: list[list[int]] = []

    async def use() -> None:
        async with world.client([world.address]) as swarm:
            model = await swarm.load(folder_of(tiny_llama))
            async with model.session(max_length=32) as session:
                results.append([token async for token in session.generate(PROMPT, **GREEDY)])

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(use)
    assert results == [local_tokens(local)] * 4
