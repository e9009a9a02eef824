"""The three transports that are compared, each as a server process and a client: ours, stock noise+yamux, bare TCP.

A server echoes on one protocol and swallows on another, where each chunk is acknowledged. It prints its address, and
the CPU seconds it has used whenever a line comes on its standard input.
"""

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import trio

from p2pswarm.core.ids import ProtocolId
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Stream

ECHO = ProtocolId("/bench/echo/1")
SINK = ProtocolId("/bench/sink/1")
READ_BYTES = 1 << 20


class Channel(Protocol):
    """What the measurements need of a stream."""

    async def read(self, max_bytes: int) -> bytes: ...

    async def write(self, data: bytes) -> None: ...

    async def end(self) -> None: ...


class StreamChannel:
    """Over a stream of ours."""

    def __init__(self, stream: Stream) -> None:
        self.read = stream.read
        self.write = stream.write
        self.end = stream.close_write


class StockChannel:
    """Over a stream of py-libp2p's own host."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def read(self, max_bytes: int) -> bytes:
        from libp2p.network.stream.exceptions import StreamEOF

        try:
            return bytes(await self._stream.read(max_bytes))
        except StreamEOF:
            return b""

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def end(self) -> None:
        await self._stream.close()


class TcpChannel:
    """Over a socket of its own."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def end(self) -> None:
        await self._stream.send_eof()


OpenChannel = Callable[[ProtocolId], Awaitable[Channel]]


async def echo(channel: Channel) -> None:
    while data := await channel.read(READ_BYTES):
        await channel.write(data)


async def sink(channel: Channel) -> None:
    """Swallows chunks of a length given first, and acknowledges each chunk's end with one byte."""
    header = b""
    while len(header) < 8:
        header += await channel.read(8 - len(header))
    chunk_bytes = int.from_bytes(header, "big")
    num_received = 0
    while data := await channel.read(READ_BYTES):
        num_received += len(data)
        while num_received >= chunk_bytes:
            num_received -= chunk_bytes
            await channel.write(b".")


@contextlib.asynccontextmanager
async def ours_server() -> AsyncIterator[str]:
    async with open_network(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as network:
        network.serve(ECHO, lambda stream: echo(StreamChannel(stream)))
        network.serve(SINK, lambda stream: sink(StreamChannel(stream)))
        yield network.addresses[0]


@contextlib.asynccontextmanager
async def ours_client(address: str) -> AsyncIterator[OpenChannel]:
    async with open_network(Identity.generate()) as network:
        peer_id = await network.connect(address)

        async def open_channel(protocol: ProtocolId) -> Channel:
            return StreamChannel(await network.open_stream(peer_id, protocol))

        yield open_channel


def stock_host(listen: list[Any]) -> Any:
    """A host as py-libp2p makes it, with noise and yamux and nothing in their way."""
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_key_pair
    from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
    from libp2p.security.noise.transport import Transport
    from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
    from libp2p.stream_muxer.yamux.yamux import Yamux

    keys = create_new_key_pair()
    noise = Transport(keys, noise_privkey=create_new_noise_key_pair().private_key)
    return new_host(keys, sec_opt={NOISE: noise}, muxer_opt={YAMUX: Yamux}, listen_addrs=listen)  # type: ignore[dict-item]


@contextlib.asynccontextmanager
async def stock_server() -> AsyncIterator[str]:
    from libp2p.custom_types import TProtocol
    from multiaddr import Multiaddr

    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    host = stock_host(listen)

    def handler(function: Callable[[Channel], Awaitable[None]]) -> Any:
        async def handle(stream: Any) -> None:
            await function(StockChannel(stream))

        return handle

    host.set_stream_handler(TProtocol(ECHO), handler(echo))
    host.set_stream_handler(TProtocol(SINK), handler(sink))
    async with host.run(listen_addrs=listen):
        yield str(host.get_addrs()[0])


@contextlib.asynccontextmanager
async def stock_client(address: str) -> AsyncIterator[OpenChannel]:
    from libp2p.custom_types import TProtocol
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    host = stock_host([])
    info = info_from_p2p_addr(Multiaddr(address))
    async with host.run(listen_addrs=[]):
        await host.connect(info)

        async def open_channel(protocol: ProtocolId) -> Channel:
            return StockChannel(await host.new_stream(info.peer_id, [TProtocol(protocol)]))

        yield open_channel
        await host.disconnect(info.peer_id)


@contextlib.asynccontextmanager
async def tcp_server() -> AsyncIterator[str]:
    async def handle(stream: trio.SocketStream) -> None:
        kind = await stream.receive_some(1)
        await (echo if kind == b"e" else sink)(TcpChannel(stream))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, handle, 0)
        yield str(listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def tcp_client(address: str) -> AsyncIterator[OpenChannel]:
    async with contextlib.AsyncExitStack() as stack:

        async def open_channel(protocol: ProtocolId) -> Channel:
            stream = await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", int(address)))
            await stream.send_all(b"e" if protocol == ECHO else b"s")
            return TcpChannel(stream)

        yield open_channel


SERVERS: dict[str, Callable[[], AbstractAsyncContextManager[str]]] = {
    "ours": ours_server,
    "noise+yamux": stock_server,
    "bare TCP": tcp_server,
}
CLIENTS: dict[str, Callable[[str], AbstractAsyncContextManager[OpenChannel]]] = {
    "ours": ours_client,
    "noise+yamux": stock_client,
    "bare TCP": tcp_client,
}


async def serve(name: str) -> None:
    async with SERVERS[name]() as address:
        print(address, flush=True)
        while await trio.to_thread.run_sync(sys.stdin.readline):
            times = os.times()
            print(times.user + times.system, flush=True)


if __name__ == "__main__":
    trio.run(serve, sys.argv[1])
