"""Hole punching where nobody is behind a router: both nodes knock at each other on one machine, in every order."""

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from p2pswarm.core.clock import SystemClock
from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import ProtocolId
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.host import Host, open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.libp2p_parts import YAMUX_PROTOCOL, Yamux
from p2pswarm.net.nat.hole_punch_messages import DCUTR_PROTOCOL, read_connect
from p2pswarm.net.nat.probing import Probing
from p2pswarm.net.nat.relay import Relay
from p2pswarm.net.nat.reservation import reserve
from p2pswarm.net.network import Stream
from p2pswarm.net.private.private_swarm import PrivateSwarm
from p2pswarm.net.private.swarm_key import SwarmKey

pytestmark = pytest.mark.real

ECHO = ProtocolId("/test/echo/1")
DIRECT_WITHIN_S = 10.0
KEY = SwarmKey(bytes(range(32)), Identity.generate().peer_id)


@dataclass
class World:
    relay: Host
    relaying: Relay
    called: Host
    caller: Host


@asynccontextmanager
async def open_world(
    caller_listens: bool = False,
    is_private: bool = False,
    caller_config: NetworkConfig = NetworkConfig(),  # noqa: B008
) -> AsyncIterator[World]:
    """A caller that knows only the relay's circuit to the called node."""
    open_node = functools.partial(open_network, private=PrivateSwarm.of(KEY) if is_private else None)
    at = ["/ip4/127.0.0.1/tcp/0"]
    async with (
        open_node(Identity.generate(), listen=at) as relay,
        open_node(Identity.generate(), listen=at) as called,
        open_node(Identity.generate(), listen=at if caller_listens else [], config=caller_config) as caller,
        trio.open_nursery() as nursery,
    ):
        relaying = Relay(relay, SystemClock())
        relaying.serve()
        Probing(relay).serve()
        called.serve(ECHO, echo)
        await caller.connect(relay.addresses[0])
        reservation = await reserve(called, await called.connect(relay.addresses[0]))
        nursery.start_soon(reservation.hold)
        caller.add_addresses(called.peer_id, reservation.addresses)
        yield World(relay, relaying, called, caller)
        nursery.cancel_scope.cancel()


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


async def talk(stream: Stream, number: int) -> None:
    message = number.to_bytes(4, "big") * 1000
    await stream.write(message)
    received = b""
    while len(received) < len(message):
        received += await stream.read()
    assert received == message


async def talk_until_direct(world: World, stream: Stream) -> None:
    with trio.fail_after(DIRECT_WITHIN_S):
        number = 0
        while not is_direct(world.caller, world.called):
            await talk(stream, number)
            number += 1


def is_direct(one: Host, other: Host) -> bool:
    path = one.path(other.peer_id)
    return path is not None and path.is_direct


@pytest.mark.parametrize("is_private", [False, True], ids=["open swarm", "private swarm"])
@pytest.mark.parametrize("caller_listens", [False, True], ids=["caller without a listener", "both listen"])
async def test_open_stream_goes_over_and_nothing_is_left_at_the_relay(caller_listens: bool, is_private: bool) -> None:
    async with open_world(caller_listens, is_private) as world:
        stream = await world.caller.open_stream(world.called.peer_id, ECHO)
        connection = world.caller.connections.best(world.called.peer_id)
        assert not is_direct(world.caller, world.called)
        await talk_until_direct(world, stream)
        await talk(stream, 7)
        assert world.caller.connections.of(world.called.peer_id) == (connection,)
        assert is_direct(world.called, world.caller)
        with trio.fail_after(5):
            while world.relaying.statistics().num_circuits:  # noqa: ASYNC110 - the relay hears of it a moment later
                await trio.sleep(0.01)
        await world.relay.close()
        await talk(stream, 8)


async def test_stock_libp2p_node_gets_a_direct_connection_for_its_new_streams() -> None:
    async with open_world() as world:
        dialling = world.caller.upgrader._dialling
        dialling.muxer_multistream = type(dialling.muxer_multistream)({YAMUX_PROTOCOL: Yamux})
        stream = await world.caller.open_stream(world.called.peer_id, ECHO)
        await talk_until_direct(world, stream)
        await talk(stream, 1)
        later = await world.caller.open_stream(world.called.peer_id, ECHO)
        await talk(later, 2)
        assert len(world.caller.connections.of(world.called.peer_id)) == 2


async def test_node_that_does_not_punch_stays_behind_its_relay_unharmed() -> None:
    async with open_world(caller_config=NetworkConfig(punch_holes=False)) as world:
        stream = await world.caller.open_stream(world.called.peer_id, ECHO)
        for number in range(50):
            await talk(stream, number)
            await trio.sleep(0.01)
        assert not is_direct(world.caller, world.called)


async def test_nobody_can_have_a_node_punch_that_did_not_call_it_through_a_relay() -> None:
    async with open_world() as world:
        stream = await world.called.open_stream(world.relay.peer_id, DCUTR_PROTOCOL)
        with trio.fail_after(5), pytest.raises(ConnectionLost, match="reset"):
            await read_connect(stream)
