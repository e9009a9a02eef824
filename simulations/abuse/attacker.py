"""A stranger's machine: makes connections from an address of its own, and does with them what no honest node does.

Only what is needed to get past a server's handshake is the project's own code; what comes after is spoken by hand.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import trio

from p2pswarm.core.errors import SwarmingError
from p2pswarm.core.ids import ModelId, PeerId, ProtocolId
from p2pswarm.core.span import Span
from p2pswarm.net.addresses import parse_tcp_address, split_peer_address
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.connection import Connection, ConnectionStream
from p2pswarm.net.identity import Identity
from p2pswarm.net.negotiation import propose
from p2pswarm.net.pipe import TcpPipe
from p2pswarm.net.upgrade import Upgrader

PAUSE_AFTER_FAILURE_S = 0.05


@dataclass(frozen=True, slots=True)
class Target:
    """Who is attacked, and what it serves."""

    address: str
    source_host: str
    """Where the attacker comes from: another address than the honest clients', as it would be."""
    model_id: ModelId
    span: Span
    max_length: int
    cache_tokens: int

    @property
    def peer_id(self) -> PeerId:
        return split_peer_address(self.address)[1]


async def open_socket(target: Target) -> trio.SocketStream:
    address = parse_tcp_address(split_peer_address(target.address)[0])
    return await trio.open_tcp_stream(address.host, address.port, local_address=target.source_host)


async def connect(target: Target, identity: Identity) -> Connection:
    """A connection past its handshake; whoever gets it runs it, or speaks over it by hand."""
    upgrader = Upgrader(identity, NetworkConfig())
    with trio.fail_after(NetworkConfig().dial_timeout_s):
        return await upgrader.dialled(TcpPipe(await open_socket(target)), target.peer_id)


@asynccontextmanager
async def running(connection: Connection) -> AsyncIterator[Connection]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        yield connection
        nursery.cancel_scope.cancel()


async def open_stream(connection: Connection, protocol: ProtocolId) -> ConnectionStream:
    stream = await connection.open_stream()
    await propose(stream, protocol)
    return stream


async def again_and_again(num_tasks: int, attempt: Callable[[], Awaitable[None]]) -> None:
    """Attempts in so many tasks for ever; what the server does against it is no reason to stop."""

    async def go_on() -> None:
        while True:
            with suppress(SwarmingError, OSError, trio.TooSlowError):
                await attempt()
            await trio.sleep(PAUSE_AFTER_FAILURE_S)

    async with trio.open_nursery() as nursery:
        for _ in range(num_tasks):
            nursery.start_soon(go_on)
