"""A server behind a relay may have lost its relay only: it is tried by another way before others stand in for it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_swarm import TinySwarm

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.recovery import Recovery
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import BadAnswer, ConnectionLost, DeadlineExceeded
from p2pswarm.core.ids import PeerId
from p2pswarm.core.span import Span
from p2pswarm.net.network import Network
from p2pswarm.net.path import DIRECT, ConnectionPath
from p2pswarm.routing.bans import BanReason
from p2pswarm.routing.planner import RouteRequest

FIRST, MIDDLE, LAST = Span(0, 3), Span(3, 4), Span(4, 8)
WITH_SPARE = (FIRST, MIDDLE, LAST, MIDDLE)
STATES = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
WHOLE = RouteRequest(Span(0, 8))
RELAYED = ConnectionPath(relay=PeerId("12D3KooWrelay"))


def network_of(world: TinySwarm) -> Network:
    return world.model.servers._network


def put_behind_relays(world: TinySwarm) -> None:
    """Says of all servers that they are."""
    for peer_id, server in world.view.servers.items():
        world.view.servers[peer_id] = replace(server, using_relay=True)


async def step(session, start: int, end: int) -> torch.Tensor:
    return await session.step(StepInput(STATES[:, start:end], start))


async def test_lost_relay_is_not_a_lost_server(open_world) -> None:
    async with open_world() as world, world.model.session(max_length=20) as session:
        expected = [await step(session, 0, 5), await step(session, 5, 6)]
    async with open_world(spans=WITH_SPARE) as world, world.model.session(max_length=20) as session:
        put_behind_relays(world)
        torch.testing.assert_close(await step(session, 0, 5), expected[0], rtol=1e-4, atol=1e-5)
        route = session.route
        for hop in route.hops:
            await network_of(world).disconnect(hop.peer_id)
        torch.testing.assert_close(await step(session, 5, 6), expected[1], rtol=1e-4, atol=1e-5)
        assert session.num_recoveries == 1
        assert session.route.hops == route.hops
        assert not world.model.servers.banned


async def test_servers_that_can_be_dialled_are_left_out_after_a_lost_connection(open_world) -> None:
    async with open_world(spans=WITH_SPARE) as world, world.model.session(max_length=20) as session:
        await step(session, 0, 5)
        lost = session.route.hops[1].peer_id
        await network_of(world).disconnect(lost)
        await step(session, 5, 6)
        assert session.route.hops[1].peer_id != lost
        assert set(world.model.servers.banned) == {lost}


async def test_server_that_no_other_way_leads_to_is_replaced(open_world) -> None:
    async with open_world(spans=WITH_SPARE) as world, world.model.session(max_length=20) as session:
        put_behind_relays(world)
        await step(session, 0, 5)
        lost = session.route.hops[1].peer_id
        world.memory.kill(lost)
        await step(session, 5, 6)
        assert session.route.hops[1].peer_id != lost
        assert {peer_id: ban.reason for peer_id, ban in world.model.servers.banned.items()} == {
            lost: BanReason.UNREACHABLE
        }


async def test_calls_without_a_session_try_another_path_too(open_world) -> None:
    async with open_world() as world:
        put_behind_relays(world)
        expected = await world.model.forward(STATES)
        for peer_id in world.view.servers:
            await network_of(world).disconnect(peer_id)
        torch.testing.assert_close(await world.model.forward(STATES), expected, rtol=1e-4, atol=1e-5)
        assert not world.model.servers.banned


async def test_a_lie_is_no_lost_path(open_world) -> None:
    async with open_world() as world:
        put_behind_relays(world)
        liar = world.peer_of(MIDDLE)
        await world.model.servers.report_failure(BadAnswer("", liar), Recovery(ClientConfig(known_peers_path=None)))
        assert set(world.model.servers.banned) == {liar}


@pytest.mark.parametrize(
    ("error", "path", "is_left"),
    [
        (DeadlineExceeded, RELAYED, True),
        (DeadlineExceeded, DIRECT, False),
        (ConnectionLost, RELAYED, False),
    ],
    ids=["late through a relay", "late", "lost stream"],
)
async def test_a_relay_that_hangs_is_left(
    open_world,
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[str, PeerId], DeadlineExceeded],
    path: ConnectionPath,
    is_left: bool,
) -> None:
    async with open_world() as world:
        put_behind_relays(world)
        await world.model.forward(STATES)
        peer_id, network = world.peer_of(MIDDLE), network_of(world)
        monkeypatch.setattr(network, "path", lambda peer_id: path)
        await world.model.servers.report_failure(error("", peer_id), Recovery(ClientConfig(known_peers_path=None)))
        assert (peer_id not in network.connected_peers) is is_left
        assert not world.model.servers.banned


async def test_a_relay_costs_a_route_something_until_a_direct_path_is_found(
    open_world, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: dict[PeerId, ConnectionPath] = {}
    async with open_world(spans=WITH_SPARE) as world:
        monkeypatch.setattr(network_of(world), "path", paths.get)
        hidden, open_one = (peer_id for peer_id, info in world.view.servers.items() if info.span == MIDDLE)
        server = world.view.servers[hidden]
        world.view.servers[hidden] = replace(server, inference_tokens_per_s=200.0, using_relay=True)

        async def chosen() -> PeerId:
            return (await world.model.servers.route(WHOLE)).hops[1].peer_id

        assert await chosen() == open_one
        paths[hidden] = RELAYED
        assert await chosen() == open_one
        paths[hidden] = DIRECT
        assert await chosen() == hidden
        paths[hidden] = RELAYED
        assert await chosen() == open_one
