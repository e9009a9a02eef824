"""`open_world`: a server of running sums and two clients over `MemoryNetwork`, for tests of calls and sessions.

`open_chain_world`: several such servers and one client, for tests of what servers push to one another.
"""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

from p2pswarm.core.ids import PeerId, SessionId
from p2pswarm.net.network import Network, Stream, StreamHandler
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.limits import DEFAULT_RPC_LIMITS, RPC_PROTOCOL, RpcLimits
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.memory_network import DEFAULT_LINK, Link, MemoryNetwork
from p2pswarm.testing.memory_node import MemoryNode
from p2pswarm.testing.running_sum_service import SUM_MODEL, SUM_SPAN, RunningSumService, read_rows, wire_rows
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import Message, NextHop, OpenSession, Step

TIMEOUT_S = 30.0


@dataclass
class World:
    """One server, two clients."""

    memory: MemoryNetwork
    service: RunningSumService
    server: RpcServer
    server_scope: trio.CancelScope
    peer_id: PeerId
    """The server's."""
    server_network: Network
    network: Network
    """The first client's."""
    client: RpcClient
    other_client: RpcClient

    async def open_raw(self) -> Stream:
        """A stream of the first client, to write anything on."""
        return await self.network.open_stream(self.peer_id, RPC_PROTOCOL)

    async def open_framed(self) -> FramedStream:
        return FramedStream(await self.open_raw())

    def open_session(
        self, session_id: str = "session", *, max_length: int = 100, batch_size: int = 1, other: bool = False
    ) -> AbstractAsyncContextManager[RemoteSession]:
        client = self.other_client if other else self.client
        return client.open_session(self.peer_id, open_request(session_id, max_length, batch_size), TIMEOUT_S)

    def serve_instead(self, handler: StreamHandler) -> None:
        """Puts a server that may do anything in the place of ours."""
        self.server_network.serve(RPC_PROTOCOL, handler)

    async def hear(self, framed: FramedStream) -> Message | None:
        """The server's next message."""
        with trio.fail_after(TIMEOUT_S):
            return await framed.receive()

    async def until_quiet(self) -> None:
        """Waits until the server holds nothing any more; fails after the longest timeout it has."""
        await until_quiet(self.server, self.service)


async def until_quiet(server: RpcServer, service: RunningSumService) -> None:
    """Waits until the server holds nothing any more; fails after the longest timeout it has."""
    with trio.fail_after(1000):
        while server.statistics().num_streams:  # noqa: ASYNC110 - the server announces this to nobody
            await trio.sleep(0.1)
    statistics = server.statistics()
    assert (statistics.num_peers, statistics.num_sessions, statistics.received_bytes) == (0, 0, 0)
    assert statistics.num_pushes_waiting == 0
    assert service.num_opened == service.num_closed


@dataclass
class ChainServer:
    """One server of a chain."""

    node: MemoryNode
    service: RunningSumService
    server: RpcServer

    @property
    def peer_id(self) -> PeerId:
        return self.node.peer_id

    def hop(self, session_id: str) -> NextHop:
        """What is said to who pushes to a session here."""
        return NextHop(self.peer_id, SessionId(session_id), self.node.addresses)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self.server.run(task_status=task_status)


@dataclass
class ChainWorld:
    """A client, connected to servers that do not know one another."""

    memory: MemoryNetwork
    network: Network
    client: RpcClient
    servers: Sequence[ChainServer]

    def open_session(self, index: int, session_id: str) -> AbstractAsyncContextManager[RemoteSession]:
        """A session at the server of that number."""
        return self.client.open_session(self.servers[index].peer_id, open_request(session_id), TIMEOUT_S)

    async def until_quiet(self) -> None:
        """Waits until no server holds anything any more but streams on which others push."""
        self.client.close()
        for server in self.servers:
            await until_quiet(server.server, server.service)


def open_request(session_id: str = "session", max_length: int = 100, batch_size: int = 1) -> OpenSession:
    """Asks for a session over all the server's blocks."""
    return OpenSession(SessionId(session_id), SUM_MODEL, SUM_SPAN, max_length, batch_size)


async def step(session: RemoteSession, step_id: int, position: int, row: Sequence[float]) -> list[float]:
    """Runs one row of tokens; the sums that come back."""
    reply = await session.step(Step(step_id, position, wire_rows([list(row)])), TIMEOUT_S)
    return read_rows(reply.hidden_states)[0]


@asynccontextmanager
async def open_world(
    service: RunningSumService | None = None, limits: RpcLimits = DEFAULT_RPC_LIMITS
) -> AsyncIterator[World]:
    """The three nodes, connected; all of it ends with the block."""
    memory = MemoryNetwork(random.Random(5))
    service = service or RunningSumService()
    async with memory.node(1) as node, memory.node(2) as network, memory.node(3) as other, trio.open_nursery() as tasks:
        server = RpcServer(node, service, limits)
        scope = trio.CancelScope()

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await server.run(task_status=task_status)

        await tasks.start(serve)
        for client in (network, other):
            await client.connect(node.addresses[0])
        yield World(
            memory=memory,
            service=service,
            server=server,
            server_scope=scope,
            peer_id=node.peer_id,
            server_network=node,
            network=network,
            client=RpcClient(network, limits),
            other_client=RpcClient(other, limits),
        )
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def open_chain_world(
    num_servers: int, *, link: Link = DEFAULT_LINK, delay_s: float = 0.0, limits: RpcLimits = DEFAULT_RPC_LIMITS
) -> AsyncIterator[ChainWorld]:
    """The servers, which take `delay_s` for a step, and the client; all of it ends with the block."""
    memory = MemoryNetwork(random.Random(5), link)
    async with AsyncExitStack() as stack:
        servers = []
        for number in range(num_servers):
            node = await stack.enter_async_context(memory.node(number + 1))
            service = RunningSumService(delay_s=delay_s)
            servers.append(ChainServer(node, service, RpcServer(node, service, limits)))
        async with memory.node(100) as network, trio.open_nursery() as tasks:
            for server in servers:
                await tasks.start(server.run)
                await network.connect(server.node.addresses[0])
            yield ChainWorld(memory, network, RpcClient(network, limits), servers)
            tasks.cancel_scope.cancel()
