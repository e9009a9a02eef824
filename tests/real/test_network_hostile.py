"""A real node against strangers: noise on its port, broken frames, stock libp2p nodes, taken ports."""

import contextlib
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from p2pswarm.core.errors import ConfigError, ConnectionLost
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.addresses import parse_tcp_address, split_peer_address
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.mux_connection import MuxConnection
from p2pswarm.net.mux_frames import FrameType, encode_header
from p2pswarm.net.negotiation import GREETING, encode_message
from p2pswarm.net.network import Network
from p2pswarm.net.pipe import TcpPipe
from p2pswarm.net.upgrade import Upgrader
from p2pswarm.testing.network_contract import ECHO, HOLD, echo, hold, read_all, read_exactly

pytestmark = pytest.mark.real
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@asynccontextmanager
async def node(config: NetworkConfig = NetworkConfig()) -> AsyncIterator[Network]:  # noqa: B008
    async with open_network(Identity.generate(), listen=[LOOPBACK], config=config) as network:
        network.serve(ECHO, echo)
        network.serve(HOLD, hold)
        yield network


async def open_socket(address: str) -> trio.SocketStream:
    target = parse_tcp_address(split_peer_address(address)[0])
    return await trio.open_tcp_stream(target.host, target.port)


async def assert_echoes(network: Network, peer_id: PeerId) -> None:
    stream = await network.open_stream(peer_id, ECHO)
    await stream.write(b"as ever")
    await stream.close_write()
    assert await read_all(stream) == b"as ever"


OPENING = encode_message(GREETING) + encode_message(HOLD)
BROKEN_FRAMES = {
    "random bytes": random.Random(41).randbytes(1000),
    "unknown version": b"\x09" + bytes(11),
    "a stream never opened": encode_header(FrameType.DATA, 0, 99, 5) + b"hello",
    "an endless frame": encode_header(FrameType.DATA, 1, 1, 2**31),
    "more than the window": encode_header(FrameType.DATA, 1, 1, 16 << 20) + OPENING.ljust(16 << 20),
}


@pytest.mark.parametrize("frames", BROKEN_FRAMES.values(), ids=BROKEN_FRAMES.keys())
async def test_broken_frames_end_that_connection_only(frames: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="p2pswarm")
    async with node() as server, open_network(Identity.generate()) as honest:
        await honest.connect(server.addresses[0])
        stream = await honest.open_stream(server.peer_id, ECHO)
        upgrader = Upgrader(Identity.generate(), NetworkConfig())
        attacker = await upgrader.dialled(TcpPipe(await open_socket(server.addresses[0])), server.peer_id)
        assert isinstance(attacker, MuxConnection)
        with trio.fail_after(5), contextlib.suppress(ConnectionLost):
            await attacker._transports.outgoing.write_all([frames])
            while await attacker._transports.outgoing.read_some():
                pass
        await attacker._transports.outgoing.close()
        await stream.write(b"untouched")
        assert await read_exactly(stream, 9) == b"untouched"
        assert server.connected_peers == {honest.peer_id}


async def test_noise_on_the_port_harms_nobody() -> None:
    randomness = random.Random(42)
    async with node() as server, open_network(Identity.generate()) as honest:
        await honest.connect(server.addresses[0])
        for size in (0, 1, 20, 1000, 100_000):
            async with await open_socket(server.addresses[0]) as socket:
                await socket.send_all(randomness.randbytes(size))
        silent = [await open_socket(server.addresses[0]) for _ in range(100)]
        await assert_echoes(honest, server.peer_id)
        async with open_network(Identity.generate()) as late:
            await late.connect(server.addresses[0])
            await assert_echoes(late, server.peer_id)
        for socket in silent:
            await trio.aclose_forcefully(socket)


async def test_half_open_handshakes_are_given_up() -> None:
    async with node(NetworkConfig(dial_timeout_s=0.5)) as server, await open_socket(server.addresses[0]) as socket:
        with trio.fail_after(3):
            while await socket.receive_some():
                pass


async def test_streams_opened_and_reset_do_not_pile_up_handlers() -> None:
    num_running = 0

    async def stay(_: object) -> None:
        nonlocal num_running
        num_running += 1
        await trio.sleep_forever()

    async with (
        node(NetworkConfig(max_streams_per_connection=10)) as server,
        open_network(Identity.generate()) as client,
    ):
        server.serve(HOLD, stay)
        await client.connect(server.addresses[0])
        for _ in range(30):
            with contextlib.suppress(ConnectionLost):
                (await client.open_stream(server.peer_id, HOLD)).reset()
        assert num_running == 10


async def test_taken_port_is_named() -> None:
    async with node() as server:
        transport, _ = split_peer_address(server.addresses[0])
        port = transport.rpartition("/")[2]
        with pytest.raises(ConfigError, match=f"port {port} is taken"):
            async with open_network(Identity.generate(), listen=[transport]):
                pass


@pytest.mark.parametrize("address", ["/ip4/203.0.113.9/tcp/0", "/dns4/localhost/tcp/0", "/ip4/127.0.0.1/udp/0", "x"])
async def test_address_that_cannot_be_listened_on_is_a_config_error(address: str) -> None:
    with pytest.raises(ConfigError):
        async with open_network(Identity.generate(), listen=[address]):
            pass


async def test_wildcards_are_announced_as_addresses_that_can_be_dialled() -> None:
    async with open_network(Identity.generate(), listen=["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"]) as server:
        server.serve(ECHO, echo)
        assert len(server.addresses) >= 2
        for address in server.addresses:
            assert "/0.0.0.0/" not in address
            async with open_network(Identity.generate()) as client:
                await client.connect(address)
                await assert_echoes(client, server.peer_id)


async def test_dead_addresses_of_a_peer_do_not_keep_from_the_living_one() -> None:
    async with node() as server, open_network(Identity.generate()) as client:
        dead = [f"/ip4/127.0.0.1/tcp/{port}" for port in (1, 2, 3)]
        client.add_addresses(server.peer_id, [*dead, "/ip4/192.0.2.255/tcp/9", *server.addresses])
        with trio.fail_after(3):
            await assert_echoes(client, server.peer_id)


async def test_thirty_nodes_that_connect_to_one_at_once_all_get_in() -> None:
    async with node() as server, trio.open_nursery() as nursery:

        async def join() -> None:
            async with open_network(Identity.generate()) as client:
                await client.connect(server.addresses[0])
                await assert_echoes(client, server.peer_id)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for _ in range(30):
                    nursery.start_soon(join)


async def test_handler_that_crashes_is_logged_and_takes_nothing_with_it(caplog: pytest.LogCaptureFixture) -> None:
    async def crash(_: object) -> None:
        raise ZeroDivisionError("a bug")

    async with node() as server, open_network(Identity.generate()) as client:
        server.serve(HOLD, crash)
        await client.connect(server.addresses[0])
        stream = await client.open_stream(server.peer_id, HOLD)
        with pytest.raises(ConnectionLost):
            await stream.read()
        await assert_echoes(client, server.peer_id)
    assert "a bug" in caplog.text


async def test_stock_libp2p_node_is_served_over_yamux() -> None:
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.custom_types import TProtocol
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    with trio.fail_after(30):
        async with node() as server:
            host = new_host(create_new_key_pair())
            async with host.run(listen_addrs=[]):
                info = info_from_p2p_addr(Multiaddr(server.addresses[0]))
                await host.connect(info)
                stream = await host.new_stream(info.peer_id, [TProtocol(ECHO)])
                data = random.Random(43).randbytes(300_000)
                await stream.write(data)
                received = b""
                while len(received) < len(data):
                    received += await stream.read(65536)
                assert received == data
                await stream.close()
                await host.disconnect(info.peer_id)


async def test_node_dials_a_stock_libp2p_node_over_yamux() -> None:
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.custom_types import TProtocol
    from libp2p.network.stream.net_stream import NetStream
    from multiaddr import Multiaddr

    async def stock_echo(stream: NetStream) -> None:
        while data := await stream.read(1000):
            await stream.write(data)

    with trio.fail_after(30):
        host = new_host(create_new_key_pair(), listen_addrs=[Multiaddr(LOOPBACK)])
        host.set_stream_handler(TProtocol(ECHO), stock_echo)  # type: ignore[arg-type]
        async with host.run(listen_addrs=[Multiaddr(LOOPBACK)]), open_network(Identity.generate()) as client:
            peer_id = await client.connect(str(host.get_addrs()[0]))
            stream = await client.open_stream(peer_id, ECHO)
            await stream.write(b"to the old world")
            assert await read_exactly(stream, 16) == b"to the old world"
            with pytest.raises(Exception, match="does not speak"):
                await client.open_stream(peer_id, ProtocolId("/unknown/1"))
