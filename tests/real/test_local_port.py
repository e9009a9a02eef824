"""Dialling from the port that is listened on: real sockets, between two addresses of this machine."""

import errno
import socket
from collections.abc import Iterator

import psutil
import pytest
import trio

from p2pswarm.core.errors import ConfigError
from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.host import Host, open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.local_port import REUSE_PORT, LocalPort

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(REUSE_PORT is None, reason="this system does not let several sockets have one port"),
]


def own_host() -> str | None:
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                return entry.address
    return None


HOST = own_host()
"""An address of this machine that is not loopback: that one needs no router, and any port will do."""
needs_host = pytest.mark.skipif(HOST is None, reason="this machine has no IPv4 address but loopback")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((HOST or "127.0.0.1", 0)) as listener:
        yield listener


def address_of(listener: socket.socket) -> TcpAddress:
    return TcpAddress("ip4", *listener.getsockname())


async def dials_from_its_port(network: Host, dialler: Host) -> bool:
    await dialler.connect(network.addresses[0])
    path = network.path(dialler.peer_id)
    assert path is not None
    assert path.remote is not None
    await dialler.disconnect(network.peer_id)
    return path.remote.port == dialler.own_listen_addresses()[0].port


@needs_host
async def test_a_node_dials_from_the_port_it_listens_on_unless_others_can_dial_it() -> None:
    async with (
        open_network(Identity.generate(), listen=[f"/ip4/{HOST}/tcp/0"]) as network,
        open_network(Identity.generate(), listen=["/ip4/0.0.0.0/tcp/0"]) as dialler,
    ):
        assert await dials_from_its_port(network, dialler)
        dialler.publish(None)
        assert not await dials_from_its_port(network, dialler)


@needs_host
async def test_a_node_behind_a_relay_keeps_to_its_port() -> None:
    async with (
        open_network(Identity.generate(), listen=[f"/ip4/{HOST}/tcp/0"]) as network,
        open_network(Identity.generate(), listen=["/ip4/0.0.0.0/tcp/0"]) as dialler,
    ):
        dialler.publish(None)
        dialler.publish([f"{network.addresses[0]}/p2p-circuit"])
        assert await dials_from_its_port(network, dialler)


@needs_host
async def test_a_node_without_a_listener_dials_from_one_port_all_the_same(listener: socket.socket) -> None:
    local_port = LocalPort()
    with socket.create_server((HOST, 0)) as other:
        first = await local_port.dial(address_of(listener))
        second = await local_port.dial(address_of(other))
        assert first.socket.getsockname()[1] == second.socket.getsockname()[1] == local_port.ports["ip4"]
        await first.aclose()
        await second.aclose()


@needs_host
async def test_a_second_connection_to_the_same_place_takes_any_port(listener: socket.socket) -> None:
    local_port = LocalPort()
    first = await local_port.dial(address_of(listener))
    second = await local_port.dial(address_of(listener))
    assert second.socket.getsockname()[1] != first.socket.getsockname()[1]
    with pytest.raises(OSError, match="ssign") as caught:
        await local_port.dial_from_here(address_of(listener))
    assert caught.value.errno == errno.EADDRNOTAVAIL
    await first.aclose()
    await second.aclose()


async def test_a_port_that_is_listened_on_stays_taken_for_others() -> None:
    async with open_network(Identity.generate(), listen=["/ip4/0.0.0.0/tcp/0"]) as network:
        port = network.own_listen_addresses()[0].port
        with pytest.raises(ConfigError, match="taken by another program"):
            async with open_network(Identity.generate(), listen=[f"/ip4/0.0.0.0/tcp/{port}"]):
                pass


async def test_connections_within_this_machine_take_any_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        local_port = LocalPort()
        stream = await local_port.dial(address_of(listener))
        assert local_port.ports == {}
        await stream.aclose()


async def test_listening_for_a_moment_on_the_port_that_is_dialled_from(listener: socket.socket) -> None:
    local_port = LocalPort()
    dialled = await local_port.dial_from_here(address_of(listener))
    moment = await local_port.open_listener("ip4")
    assert moment.socket.getsockname()[1] == dialled.socket.getsockname()[1]
    caller = await trio.open_tcp_stream("127.0.0.1", local_port.ports["ip4"])
    accepted = await moment.accept()
    for opened in (caller, accepted, moment, dialled):
        await opened.aclose()
