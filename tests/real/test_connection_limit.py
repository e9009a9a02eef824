"""A node that has all the connections it may: those nobody uses make room, those in use do not."""

from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from p2pswarm.core.errors import PeerUnreachable
from p2pswarm.core.ids import PeerId
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Network, Stream
from p2pswarm.testing.network_contract import ECHO, HOLD, echo, hold, read_exactly

pytestmark = pytest.mark.real

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
IDLE_TIMEOUT_S = 0.3


@asynccontextmanager
async def node(**settings: float) -> AsyncIterator[Network]:
    config = NetworkConfig(**settings)  # type: ignore[arg-type]
    async with open_network(Identity.generate(), listen=[LOOPBACK], config=config) as network:
        network.serve(ECHO, echo)
        network.serve(HOLD, hold)
        yield network


async def connected(stack: AsyncExitStack, server: Network) -> Network:
    """A new client of the server, without a stream; at the server too."""
    client = await stack.enter_async_context(open_network(Identity.generate()))
    await client.connect(server.addresses[0])
    await until_there(server, client)
    return client


async def until_there(server: Network, client: Network) -> None:
    with trio.fail_after(5):
        while client.peer_id not in server.connected_peers:  # noqa: ASYNC110 - a network announces this to nobody
            await trio.sleep(0.005)


async def until_connected_to(network: Network, peers: Collection[PeerId]) -> None:
    with trio.fail_after(5):
        while network.connected_peers != frozenset(peers):  # noqa: ASYNC110
            await trio.sleep(0.005)


async def assert_works(stream: Stream) -> None:
    await stream.write(b"as ever")
    assert await read_exactly(stream, 7) == b"as ever"


async def test_the_connection_idle_longest_makes_room_for_a_newcomer() -> None:
    async with node(max_connections=3) as server, AsyncExitStack() as stack:
        busy, idle_longest, idle = [await connected(stack, server) for _ in range(3)]
        stream = await busy.open_stream(server.peer_id, ECHO)
        first_use = await idle.open_stream(server.peer_id, ECHO)
        await assert_works(first_use)
        first_use.reset()
        newcomer = await connected(stack, server)
        await until_connected_to(server, {busy.peer_id, idle.peer_id, newcomer.peer_id})
        await until_connected_to(idle_longest, ())
        await assert_works(stream)
        await assert_works(await newcomer.open_stream(server.peer_id, ECHO))


async def test_who_had_to_leave_comes_back_when_there_is_need() -> None:
    async with node(max_connections=1) as server, AsyncExitStack() as stack:
        first = await connected(stack, server)
        second = await connected(stack, server)
        await until_connected_to(first, ())
        await assert_works(await first.open_stream(server.peer_id, ECHO))
        await until_connected_to(second, ())


async def test_newcomers_are_refused_while_all_connections_are_in_use() -> None:
    async with node(max_connections=1) as server, AsyncExitStack() as stack:
        busy = await connected(stack, server)
        stream = await busy.open_stream(server.peer_id, HOLD)
        late = await stack.enter_async_context(open_network(Identity.generate()))
        with pytest.raises(PeerUnreachable):
            await late.connect(server.addresses[0])
        assert server.connected_peers == {busy.peer_id}
        stream.reset()
        with trio.fail_after(5):
            while server.connected_peers != {late.peer_id}:
                try:
                    await late.connect(server.addresses[0])
                except PeerUnreachable:
                    await trio.sleep(0.01)


async def test_many_newcomers_at_once_never_exceed_the_limit() -> None:
    async with node(max_connections=4) as server, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(open_network(Identity.generate())) for _ in range(20)]
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.connect, server.addresses[0])
        assert 1 <= len(server.connected_peers) <= 4


async def test_who_dialled_closes_what_is_idle() -> None:
    async with (
        node() as server,
        open_network(Identity.generate(), config=NetworkConfig(idle_connection_timeout_s=IDLE_TIMEOUT_S)) as client,
    ):
        await client.connect(server.addresses[0])
        stream = await client.open_stream(server.peer_id, ECHO)
        await trio.sleep(3 * IDLE_TIMEOUT_S)
        await assert_works(stream)
        stream.reset()
        ended_at_s = trio.current_time()
        await until_connected_to(client, ())
        assert trio.current_time() - ended_at_s >= IDLE_TIMEOUT_S
        await until_connected_to(server, ())
        await assert_works(await client.open_stream(server.peer_id, ECHO))


async def test_who_was_dialled_leaves_it_to_the_other_side() -> None:
    async with node(idle_connection_timeout_s=IDLE_TIMEOUT_S) as server, AsyncExitStack() as stack:
        client = await connected(stack, server)
        await trio.sleep(3 * IDLE_TIMEOUT_S)
        assert server.connected_peers == {client.peer_id}


async def test_a_stock_libp2p_node_is_left_too_when_nothing_is_open() -> None:
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.custom_types import TProtocol
    from libp2p.network.stream.net_stream import NetStream
    from multiaddr import Multiaddr

    async def stock_echo(stream: NetStream) -> None:
        while data := await stream.read(1000):
            await stream.write(data)

    host = new_host(create_new_key_pair(), listen_addrs=[Multiaddr(LOOPBACK)])
    host.set_stream_handler(TProtocol(ECHO), stock_echo)  # type: ignore[arg-type]
    config = NetworkConfig(idle_connection_timeout_s=IDLE_TIMEOUT_S)
    async with host.run(listen_addrs=[Multiaddr(LOOPBACK)]), open_network(Identity.generate(), config=config) as client:
        peer_id = await client.connect(str(host.get_addrs()[0]))
        stream = await client.open_stream(peer_id, ECHO)
        await trio.sleep(3 * IDLE_TIMEOUT_S)
        await assert_works(stream)
        stream.reset()
        await until_connected_to(client, ())
