"""Relays over real sockets: circuits are connections like any other, end when they should, and leave nothing behind."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from p2pswarm.core.clock import SystemClock
from p2pswarm.core.errors import ConnectionLost, PeerUnreachable, ProtocolViolation, RelayRefused
from p2pswarm.core.ids import PeerId
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.host import Host, open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.nat.lanes import Lane
from p2pswarm.net.nat.relay import Relay, Way
from p2pswarm.net.nat.relay_limits import Circuit, RelayLimits
from p2pswarm.net.nat.relay_messages import LANE_HOP_PROTOCOL
from p2pswarm.net.nat.reservation import reserve
from p2pswarm.net.network import Network
from p2pswarm.testing.network_contract import (
    CONTRACT,
    ECHO,
    Check,
    Nodes,
    echo,
    eventually,
    raises,
    read_all,
    read_exactly,
)

pytestmark = pytest.mark.real
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
WITHOUT_LIMITS = RelayLimits(
    max_circuits=1000,
    max_circuits_per_target=1000,
    max_circuits_per_source=1000,
    circuit_s=None,
    circuit_bytes=None,
    rate_bytes_per_s=None,
)
UNMOVED = NetworkConfig(punch_holes=False)
"""A circuit stays one, though both ends are on this machine."""
DIRECT_ONLY = {
    "the_path_to_a_peer_is_known_while_there_is_a_connection",
    "a_fresh_dial_tells_whether_the_peer_answers_there_and_leaves_no_connection",
    "a_lane_comes_to_who_expects_it_and_to_nobody_else",
    "published_addresses_stand_for_the_own_ones_until_they_are_withdrawn",
    "peers_that_cannot_be_reached_are_told_apart_from_bad_addresses",
}
"""What the contract says of addresses that can be dialled directly."""


@asynccontextmanager
async def relaying(limits: RelayLimits = WITHOUT_LIMITS, *, lanes: bool = True) -> AsyncIterator[tuple[Host, Relay]]:
    """A relay; without `lanes` one as others have them, that knows libp2p's protocol alone."""
    async with open_network(Identity.generate(), listen=[LOOPBACK]) as host:
        relay = Relay(host, SystemClock(), limits)
        relay.serve()
        if not lanes:
            del host._handlers[LANE_HOP_PROTOCOL]
        yield host, relay


@asynccontextmanager
async def behind(*relays: Host) -> AsyncIterator[Host]:
    """A node without a listener that can be reached through these relays."""
    async with open_network(Identity.generate(), config=UNMOVED) as host, trio.open_nursery() as nursery:
        addresses: list[str] = []
        for relay in relays:
            host.add_addresses(relay.peer_id, relay.addresses)
            reservation = await reserve(host, relay.peer_id)
            addresses += reservation.addresses
            nursery.start_soon(reservation.hold)
        host.publish(addresses)
        host.serve(ECHO, echo)
        yield host
        nursery.cancel_scope.cancel()


def client() -> contextlib.AbstractAsyncContextManager[Host]:
    return open_network(Identity.generate(), config=UNMOVED)


async def exchange(network: Network, peer_id: PeerId, data: bytes = b"over and back") -> None:
    stream = await network.open_stream(peer_id, ECHO)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, data)
        assert await read_exactly(stream, len(data)) == data
    await stream.close_write()
    assert await read_all(stream) == b""


@pytest.mark.parametrize(
    "lanes", [True, pytest.param(False, marks=[pytest.mark.slow, pytest.mark.exhaustive])], ids=["lanes", "streams"]
)
@pytest.mark.parametrize(
    "check", [check for check in CONTRACT if check.__name__ not in DIRECT_ONLY], ids=lambda check: check.__name__
)
async def test_network_keeps_its_contract_through_a_relay(check: Check, lanes: bool) -> None:
    async with relaying(lanes=lanes) as (relay_host, relay):
        await check(Nodes(lambda: behind(relay_host), longest_wait_s=0.004))
        await eventually(lambda: relay.statistics().num_circuits == 0)


@pytest.mark.slow
async def test_two_hundred_clients_one_after_the_other_leave_nothing_behind() -> None:
    async with relaying(RelayLimits()) as (relay_host, relay), behind(relay_host) as server:
        await exchange_once(server)
        await eventually(lambda: relay_host.connected_peers == {server.peer_id})
        await eventually(lambda: server.connected_peers == {relay_host.peer_id})
        num_tasks, num_streams = running_tasks(), open_streams(relay_host, server)
        for _ in range(200):
            await exchange_once(server)
        await eventually(lambda: relay_host.connected_peers == {server.peer_id})
        await eventually(lambda: server.connected_peers == {relay_host.peer_id})
        await eventually(lambda: running_tasks() <= num_tasks)
        statistics = relay.statistics()
        assert (statistics.num_circuits, statistics.num_reservations, statistics.num_refused) == (0, 1, 0)
        assert open_streams(relay_host, server) == num_streams


async def exchange_once(server: Host) -> None:
    async with client() as network:
        await network.connect(server.addresses[0])
        await exchange(network, server.peer_id)


def running_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def open_streams(*hosts: Host) -> int:
    return sum(connection.num_streams for host in hosts for connection in host.connections)  # type: ignore[attr-defined]


async def test_a_relay_without_room_is_routed_around_and_its_reason_told() -> None:
    full = RelayLimits(max_circuits=1)
    async with AsyncExitStack() as stack:
        small, small_relay = await stack.enter_async_context(relaying(full))
        large, large_relay = await stack.enter_async_context(relaying())
        server = await stack.enter_async_context(behind(small, large))
        for_first, for_second = server.addresses
        first, second, third = [await stack.enter_async_context(client()) for _ in range(3)]
        await first.connect(for_first)
        second.add_addresses(server.peer_id, [for_first, for_second])
        with trio.fail_after(2):
            await exchange(second, server.peer_id)
        path = second.path(server.peer_id)
        assert path is not None
        assert path.relay == large.peer_id
        assert (small_relay.statistics().num_refused, large_relay.statistics().num_circuits) == (1, 1)
        error = await raises(PeerUnreachable, lambda: third.connect(for_first))
        assert f"relay {small.peer_id} refused: it has no room for another circuit" in str(error)


async def test_when_a_relay_dies_both_ends_notice_and_meet_again_over_another() -> None:
    async with (
        relaying() as (staying, _),
        client() as network,
        relaying() as (leaving, relay),
        behind(leaving, staying) as server,
    ):
        network.add_addresses(server.peer_id, server.addresses)
        await network.connect(server.addresses[0])
        stream = await network.open_stream(server.peer_id, ECHO)
        await stream.write(b"first")
        assert await read_exactly(stream, 5) == b"first"
        assert relay.statistics().num_circuits == 1
        with trio.fail_after(5):
            await leaving.close()
            await raises(ConnectionLost, stream.read)
            await eventually(lambda: network.peer_id not in server.connected_peers)
            await exchange(network, server.peer_id)
        path = network.path(server.peer_id)
        assert path is not None
        assert path.relay == staying.peer_id


class CuriousRelay(Relay):
    """Keeps all that it passes on."""

    def __init__(self, host: Host) -> None:
        super().__init__(host, SystemClock(), WITHOUT_LIMITS)
        self.seen = bytearray()
        self.ways: list[Way] = []

    async def _pass_on(self, circuit: Circuit, source: Way, target: Way, scope: trio.CancelScope) -> None:
        self.ways.append(source)
        read = source.read

        async def read_and_keep(max_bytes: int, /) -> bytes:
            data = await read(max_bytes)
            self.seen += data
            return data

        source.read = read_and_keep  # type: ignore[method-assign]
        await super()._pass_on(circuit, source, target, scope)


async def test_a_relay_reads_nothing_of_what_it_passes_on_over_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pswarm.net.nat.relay.LANES_TIMEOUT_S", 60.0)  # however slow the machine is, no streams
    secret = b"the prompt and what became of it" * 100
    async with open_network(Identity.generate(), listen=[LOOPBACK]) as host:
        relay = CuriousRelay(host)
        relay.serve()
        async with behind(host) as server, client() as network:
            await network.connect(server.addresses[0])
            await exchange(network, server.peer_id, secret)
    assert [type(way) for way in relay.ways] == [Lane, Lane]
    assert len(relay.seen) > 2 * len(secret)
    assert b"prompt" not in relay.seen
    assert ECHO.encode() not in relay.seen


@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "streams"])
async def test_what_goes_through_a_relay_counts_once_as_traffic(lanes: bool) -> None:
    async with relaying(lanes=lanes) as (relay_host, _), behind(relay_host) as server, client() as network:
        await network.connect(server.addresses[0])
        await exchange(network, server.peer_id, bytes(1_000_000))
        assert 1_000_000 < network.traffic.sent_bytes < 1_050_000
        assert 1_000_000 < network.traffic.received_bytes < 1_050_000


async def test_circuits_come_only_from_relays_that_were_asked() -> None:
    async with relaying() as (asked, _), relaying() as (stranger, relay), behind(asked) as server:
        await server.connect(stranger.addresses[0])
        await eventually(lambda: server.peer_id in stranger.connected_peers)
        error = await raises(RelayRefused, lambda: relay._call(Circuit(asked.peer_id, server.peer_id), with_lanes=True))
        assert "PERMISSION_DENIED" in str(error)


async def test_who_dials_through_a_peer_that_is_no_relay_is_told() -> None:
    async with open_network(Identity.generate(), listen=[LOOPBACK]) as ordinary, client() as network:
        target = Identity.generate().peer_id
        error = await raises(
            PeerUnreachable, lambda: network.connect(f"{ordinary.addresses[0]}/p2p-circuit/p2p/{target}")
        )
        assert f"{ordinary.peer_id} does not speak /libp2p/circuit/relay" in str(error)
        await raises(ProtocolViolation, lambda: reserve(network, ordinary.peer_id))
