"""How the command finds out and tells by which way servers are reached."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import trio

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.reachability import Reachability
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.net.path import DIRECT, ConnectionPath
from swarm_cli.paths import (
    DIRECT_TIMEOUT_S,
    LOOK_PERIOD_S,
    FoundPath,
    PathWatch,
    announced_reach,
    announced_relays,
    as_reached,
    path_as_json,
    path_in_words,
)

SERVER, RELAY = PeerId("12D3server"), PeerId("12D3relay1")
RELAYED = ConnectionPath(relay=RELAY)


def info(*addresses: str, **fields: Any) -> ServerInfo:
    server = ServerInfo(
        SERVER, ModelId("m@0"), Span(0, 1), ServerState.ONLINE, addresses, 1, 1.0, 1.0, 1.0, 1.0, "float32"
    )
    return replace(server, **fields)


class Ways:
    """A network that is asked for its ways only."""

    def __init__(self) -> None:
        self.ways: dict[PeerId, ConnectionPath] = {}

    def path(self, peer_id: PeerId) -> ConnectionPath | None:
        return self.ways.get(peer_id)


async def watched(network: Ways, *changes: tuple[float, ConnectionPath]) -> tuple[FoundPath | None, float]:
    """What was found of a server whose ways are these, each from some second on, and how long the wait took."""
    watch = PathWatch(network)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run, [SERVER])
        nursery.start_soon(change_ways, network, changes)
        await trio.sleep(0.1)
        began_s = trio.current_time()
        await watch.wait_direct([SERVER])
        took_s = trio.current_time() - began_s
        nursery.cancel_scope.cancel()
    return watch.found.get(SERVER), took_s


async def change_ways(network: Ways, changes: tuple[tuple[float, ConnectionPath], ...]) -> None:
    for after_s, way in changes:
        await trio.sleep(after_s)
        network.ways[SERVER] = way


async def test_a_direct_way_is_not_waited_for(autojump_clock):
    assert await watched(Ways(), (0, DIRECT)) == (FoundPath(None), 0)


async def test_a_server_that_is_not_reached_is_not_waited_for(autojump_clock):
    assert await watched(Ways()) == (None, 0)


async def test_a_way_past_the_relay_is_waited_for_and_timed(autojump_clock):
    found, took_s = await watched(Ways(), (0, RELAYED), (0.5, DIRECT))
    assert found is not None
    assert found.relay == RELAY
    assert found.direct_after_s is not None
    assert 0.4 < found.direct_after_s < 0.6
    assert took_s < 0.6


async def test_a_way_past_the_relay_that_opens_between_two_looks_is_told_too(autojump_clock):
    found, took_s = await watched(Ways(), (0.05, replace(DIRECT, left_relay=RELAY)))
    assert (found, took_s) == (FoundPath(RELAY, direct_after_s=LOOK_PERIOD_S), 0)


async def test_who_stays_behind_a_relay_costs_three_seconds(autojump_clock):
    found, took_s = await watched(Ways(), (0, RELAYED))
    assert found == FoundPath(RELAY)
    assert DIRECT_TIMEOUT_S - 0.2 < took_s <= DIRECT_TIMEOUT_S


def test_ways_are_told_to_people_and_programs():
    assert path_in_words(None) == "not reached"
    assert path_in_words(FoundPath(None)) == "directly"
    assert path_in_words(FoundPath(RELAY)) == "through relay …relay1"
    assert path_in_words(FoundPath(RELAY, 0.44)) == "through relay …relay1, then directly after 0.4 s"
    assert path_as_json(SERVER, None) == {
        "peer_id": SERVER,
        "reached": False,
        "relay": None,
        "direct_after_s": None,
    }
    assert path_as_json(SERVER, FoundPath(RELAY, 0.44))["direct_after_s"] == 0.44


def test_what_a_server_announces_of_its_ways():
    circuits = [
        f"/ip4/192.0.2.{number}/tcp/1/p2p/{relay}/p2p-circuit/p2p/{SERVER}" for number, relay in enumerate("aab")
    ]
    relayed = info(f"/ip4/10.0.0.1/tcp/1/p2p/{SERVER}", *circuits, using_relay=True, reachability=Reachability.PRIVATE)
    assert announced_relays(relayed) == ["a", "b"]
    assert announced_reach(relayed) == "through …a, …b"
    assert announced_reach(replace(relayed, addresses=())) == "through no relay yet"
    assert announced_reach(info(reachability=Reachability.PUBLIC)) == "directly"
    assert announced_reach(info()) == "unknown"


def test_a_relay_costs_nothing_where_there_is_a_way_past_it():
    server = info(using_relay=True)
    for way, using_relay in ((None, True), (RELAYED, True), (DIRECT, False)):
        network: Any = SimpleNamespace(path=lambda _, way=way: way)
        assert [one.using_relay for one in as_reached([server], network)] == [using_relay]
