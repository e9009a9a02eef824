"""Sessions with a server that only relays lead to, over real sockets: they outlive their relays, token for token."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import trio
from tiny_swarm import FixedView, client_model, serving

from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.core.clock import SystemClock
from p2pswarm.core.ids import PeerId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.span import Span
from p2pswarm.net.host import Host, open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.nat.relay import Relay
from p2pswarm.net.nat.reservation import reserve

pytestmark = pytest.mark.real

PROMPT = [5, 17, 99, 3, 42]
NUM_TOKENS = 40
LONGEST_PAUSE_S = 5.0


@dataclass
class RunningRelay:
    """A relay with a reservation of the server."""

    peer_id: PeerId
    address: str
    """The server's, through it."""
    _end: trio.Event = field(default_factory=trio.Event)
    _ended: trio.Event = field(default_factory=trio.Event)

    async def end(self) -> None:
        self._end.set()
        await self._ended.wait()

    @classmethod
    async def run(cls, server: Host, *, task_status: trio.TaskStatus["RunningRelay"]) -> None:
        async with open_network(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as network:
            Relay(network, SystemClock()).serve()
            reservation = await reserve(server, await server.connect(network.addresses[0]))
            relay = cls(network.peer_id, f"{reservation.addresses[0]}/p2p/{server.peer_id}")
            task_status.started(relay)
            await relay._end.wait()
        relay._ended.set()


@dataclass
class World:
    """A server of all blocks behind relays, and a client."""

    model: DistributedModel
    server: Host
    view: FixedView
    relays: list[RunningRelay]
    tasks: trio.Nursery

    async def start_relay(self) -> None:
        self.relays.append(await self.tasks.start(partial(RunningRelay.run, self.server)))

    def announce(self, relays: Sequence[RunningRelay]) -> None:
        """From now on, these are where the server says that it can be dialled."""
        info = self.view.servers[self.server.peer_id]
        addresses = tuple(relay.address for relay in relays)
        self.view.servers[self.server.peer_id] = replace(info, addresses=addresses, using_relay=True)

    def relay_in_use(self) -> RunningRelay:
        path = self.model.servers._network.path(self.server.peer_id)
        assert path is not None
        return next(relay for relay in self.relays if relay.peer_id == path.relay)


@asynccontextmanager
async def open_relayed_world(checkpoint: Checkpoint, part: SpanModel, num_relays: int) -> AsyncIterator[World]:
    async with (
        open_transparent_nursery() as tasks,
        open_network(Identity.generate()) as server,
        open_network(Identity.generate()) as client,
        serving(server, checkpoint, part) as (info, _),
    ):
        view = FixedView({server.peer_id: info})
        model = client_model(checkpoint, client, view, ClientConfig(known_peers_path=None))
        world = World(model, server, view, [], tasks)
        for _ in range(num_relays):
            await world.start_relay()
        world.announce(world.relays)
        yield world
        tasks.cancel_scope.cancel()


@pytest.fixture(scope="module")
def part(tiny_llama: Checkpoint) -> SpanModel:
    return load_span(tiny_llama, Span(0, 8))


@pytest.fixture(scope="module")
def expected(local: Any) -> list[int]:
    output = local.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False)
    return list(output[0, len(PROMPT) :].tolist())


async def tokens_with_pauses(
    world: World, at_token: int, meanwhile: Callable[[], Awaitable[None]]
) -> tuple[list[int], float]:
    """What is generated, and the longest time between two tokens; `meanwhile` runs once `at_token` have come."""
    tokens: list[int] = []
    pauses_s: list[float] = []
    async with world.model.session(max_length=64) as session:
        came_at_s = trio.current_time()
        async for token in session.generate(PROMPT, max_new_tokens=NUM_TOKENS, do_sample=False):
            pauses_s.append(trio.current_time() - came_at_s)
            tokens.append(token)
            if len(tokens) == at_token:
                await meanwhile()
            came_at_s = trio.current_time()
        assert session.num_recoveries == 1
    return tokens, max(pauses_s)


async def test_session_goes_on_through_the_other_relay(tiny_llama, part: SpanModel, expected: list[int]) -> None:
    async with open_relayed_world(tiny_llama, part, num_relays=2) as world:
        first: list[RunningRelay] = []

        async def end_the_relay_in_use() -> None:
            first.append(world.relay_in_use())
            await first[0].end()

        tokens, longest_pause_s = await tokens_with_pauses(world, 10, end_the_relay_in_use)
        assert tokens == expected
        assert longest_pause_s < LONGEST_PAUSE_S
        assert world.relay_in_use() is not first[0]
        assert not world.model.servers.banned


async def test_session_goes_on_when_the_only_relay_is_a_new_one(
    tiny_llama, part: SpanModel, expected: list[int]
) -> None:
    async with open_relayed_world(tiny_llama, part, num_relays=1) as world:

        async def announce_another_relay() -> None:
            await trio.sleep(1.0)
            await world.start_relay()
            world.announce(world.relays[1:])

        async def end_the_only_relay() -> None:
            await world.relays[0].end()
            world.tasks.start_soon(announce_another_relay)

        tokens, longest_pause_s = await tokens_with_pauses(world, 10, end_the_only_relay)
        assert tokens == expected
        assert 1.0 < longest_pause_s < LONGEST_PAUSE_S
