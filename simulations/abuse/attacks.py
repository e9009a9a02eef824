"""The attacks, by name. Each goes on until it is cancelled; what the server does against it does not stop it."""

import random
import struct
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import trio

from p2pswarm.core.clock import SystemClock
from p2pswarm.core.ids import SessionId
from p2pswarm.dht.messages import DHT_PROTOCOL, MAX_RECORDS_PER_STORE, FindRecords, Store, encode_message
from p2pswarm.dht.record import KEY_BYTES, SIGNATURE_BYTES, SignedRecord
from p2pswarm.net.connection import Connection
from p2pswarm.net.identity import Identity
from p2pswarm.net.mux_connection import MuxConnection
from p2pswarm.rpc.limits import RPC_PROTOCOL
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import OpenSession
from simulations.abuse.attacker import Target, again_and_again, connect, open_socket, open_stream, running

CONNECTIONS = 1000
STREAMS = 10_000
HALF_OPEN_AT_ONCE = 600
FIRST_WORDS = b"\x13/multistream/1.0.0\n\x07/noise\n"
LONG_FRAME = struct.pack("!II", 60 << 20, 1) + b"\x80"
RECORD_LIFETIME_MS = 60_000

Attack = Callable[[Target], Awaitable[None]]


async def connections_of_one_peer(target: Target) -> None:
    identity = Identity.generate()
    await again_and_again(CONNECTIONS, partial(_stay, target, lambda: identity))


async def connections_of_many_peers(target: Target) -> None:
    await again_and_again(CONNECTIONS, partial(_stay, target, Identity.generate))


async def _stay(target: Target, identity: Callable[[], Identity]) -> None:
    async with running(await connect(target, identity())) as connection:
        await open_stream(connection, RPC_PROTOCOL)
        while await connection.accept_stream() is not None:
            pass


async def streams_without_end(target: Target) -> None:
    async def open_all() -> None:
        async with running(await connect(target, Identity.generate())) as connection, trio.open_nursery() as nursery:
            for _ in range(STREAMS):
                nursery.start_soon(hold, connection)

    async def hold(connection: Connection) -> None:
        stream = await open_stream(connection, RPC_PROTOCOL)
        while await stream.read():
            pass

    await again_and_again(1, open_all)


async def bytes_that_are_no_frames(target: Target) -> None:
    async def send_noise() -> None:
        connection = await connect(target, Identity.generate())
        assert isinstance(connection, MuxConnection)
        transport = connection._transports.outgoing
        await transport.write_all([random.randbytes(10_000)])
        while await transport.read_some():
            pass

    await again_and_again(20, send_noise)


async def calls_that_are_no_messages(target: Target) -> None:
    async def send_noise() -> None:
        async with running(await connect(target, Identity.generate())) as connection:
            while True:
                stream = await open_stream(connection, RPC_PROTOCOL)
                await stream.write(random.randbytes(10_000))
                while await stream.read():
                    pass

    await again_and_again(20, send_noise)


async def silent_sockets(target: Target) -> None:
    async def stay_silent() -> None:
        async with await open_socket(target) as socket:
            await socket.receive_some()

    await again_and_again(HALF_OPEN_AT_ONCE, stay_silent)


async def handshakes_half_way(target: Target) -> None:
    async def stop_half_way() -> None:
        async with await open_socket(target) as socket:
            await socket.send_all(FIRST_WORDS + b"\x00\x20" + random.randbytes(32))
            while await socket.receive_some():
                pass

    await again_and_again(HALF_OPEN_AT_ONCE, stop_half_way)


async def frames_in_crumbs(target: Target) -> None:
    async def trickle() -> None:
        async with running(await connect(target, Identity.generate())) as connection, trio.open_nursery() as nursery:
            for _ in range(64):
                nursery.start_soon(trickle_one, connection)

    async def trickle_one(connection: Connection) -> None:
        stream = await open_stream(connection, RPC_PROTOCOL)
        await stream.write(LONG_FRAME)
        while True:
            await stream.write(b"\0")
            await trio.sleep(0.5)

    await again_and_again(8, trickle)


async def all_of_the_cache(target: Target) -> None:
    """Sessions that ask for all the room there is, and never send a token."""

    async def reserve() -> None:
        async with running(await connect(target, identity)) as connection:
            session_id = SessionId(random.randbytes(16).hex())
            tokens = min(target.max_length, target.cache_tokens)
            request = OpenSession(
                session_id, target.model_id, target.span, tokens, 1, first_tokens=tokens, alloc_timeout_s=60.0
            )
            stream = FramedStream(await open_stream(connection, RPC_PROTOCOL))
            await stream.send(request)
            while await stream.receive() is not None:
                pass

    identity = Identity.generate()
    await again_and_again(8, reserve)


async def records_without_end(target: Target) -> None:
    """To the table of servers: records with signatures that are none, and questions."""

    async def spam() -> None:
        identity = Identity.generate()
        async with running(await connect(target, identity)) as connection:
            stream = await open_stream(connection, DHT_PROTOCOL)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read_all, stream.read)
                while True:
                    records = tuple(_forged(identity) for _ in range(MAX_RECORDS_PER_STORE))
                    await stream.write(*encode_message(Store(records), ()))
                    await stream.write(*encode_message(FindRecords(random.randbytes(KEY_BYTES)), ()))

    await again_and_again(8, spam)


def _forged(identity: Identity) -> SignedRecord:
    expires_unix_ms = int(1000 * SystemClock().unix_time_s()) + RECORD_LIFETIME_MS
    signature = random.randbytes(SIGNATURE_BYTES)
    return SignedRecord(random.randbytes(KEY_BYTES), identity.peer_id, 1, expires_unix_ms, b"none", signature)


async def _read_all(read: Callable[[], Awaitable[bytes]]) -> None:
    while await read():
        pass


ATTACKS: Mapping[str, Attack] = {
    "1,000 connections of one peer": connections_of_one_peer,
    "1,000 connections of many peers": connections_of_many_peers,
    "10,000 streams": streams_without_end,
    "bytes that are no frames": bytes_that_are_no_frames,
    "calls that are no messages": calls_that_are_no_messages,
    "sockets that say nothing": silent_sockets,
    "handshakes half way": handshakes_half_way,
    "frames in crumbs": frames_in_crumbs,
    "all of the cache": all_of_the_cache,
    "forged records": records_without_end,
}
