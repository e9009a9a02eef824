"""Bad input over real sockets: each stream hears why, a session beside them stays exact, and memory does not grow."""

import gc
import os
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest
import trio

from p2pswarm.core.errors import ConnectionLost, PeerUnreachable
from p2pswarm.core.ids import PeerId
from p2pswarm.net.connection_table import TOLERATED_OFFENCES
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Network
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.limits import RPC_PROTOCOL, RpcLimits
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.rpc_world import open_request, step
from p2pswarm.testing.running_sum_service import RunningSumService, wire_rows
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import ErrorCode, ErrorReply, InfoRequest, Message, Step
from p2pswarm.wire.serialization import encode_message

pytestmark = pytest.mark.real

A_STEP = b"".join(encode_message(Step(0, 0, wire_rows([[1, 2, 3]]))))
LIMITS = RpcLimits(first_message_timeout_s=1.0)


@asynccontextmanager
async def open_server() -> AsyncIterator[tuple[RpcServer, RunningSumService, Network, RpcClient]]:
    """A server, an attacker's network, and a neighbour's client."""
    async with (
        open_network(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as serving,
        open_network(Identity.generate()) as attacker,
        open_network(Identity.generate()) as neighbour,
        trio.open_nursery() as nursery,
    ):
        service = RunningSumService(max_length=100_000)
        server = RpcServer(serving, service, LIMITS)

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            await server.run(task_status=task_status)

        await nursery.start(serve)
        for network in (attacker, neighbour):
            await network.connect(serving.addresses[0])
        yield server, service, attacker, RpcClient(neighbour)
        nursery.cancel_scope.cancel()


def server_of(attacker: Network) -> PeerId:
    (peer_id,) = attacker.connected_peers
    return peer_id


async def answer_to(attacker: Network, data: bytes) -> Message | None:
    """What the server says to these bytes on a stream of their own."""
    stream = await attacker.open_stream(server_of(attacker), RPC_PROTOCOL)
    try:
        await stream.write(data)
        await stream.close_write()
    except ConnectionLost:
        pass  # it was thrown out before all was sent; what it was told can still be read
    with trio.fail_after(10):
        return await FramedStream(stream).receive()


def garbage(randomness: random.Random) -> bytes:
    """What no honest client sends."""
    match randomness.randrange(4):
        case 0:
            return b"\xff" + randomness.randbytes(randomness.randrange(10, 300_000))
        case 1:
            return A_STEP[: randomness.randrange(1, len(A_STEP))]
        case 2:
            return struct.pack("!II", randomness.randrange(1 << 31, 1 << 32), randomness.randrange(1 << 32))
        case _:
            return struct.pack("!II", 64 << 20, 1) + b"\x80" + bytes(1000)


async def test_garbage_is_answered_and_harms_nobody() -> None:
    randomness = random.Random(11)
    async with open_server() as (server, service, attacker, neighbour):
        peer_id = server_of(attacker)
        async with neighbour.open_session(peer_id, open_request(max_length=100_000), 10) as session:
            for index in range(TOLERATED_OFFENCES):
                answer = await answer_to(attacker, garbage(randomness))
                assert isinstance(answer, ErrorReply)
                assert answer.code is ErrorCode.BAD_REQUEST
                assert await step(session, index, index, [1]) == [index + 1]
        await trio.sleep(0.2)
        assert server.statistics().num_streams == 0
        assert server.statistics().received_bytes == 0
        assert service.num_opened == service.num_closed == 1


async def test_who_sends_nothing_but_garbage_is_refused_for_a_while() -> None:
    randomness = random.Random(12)
    async with open_server() as (_, _, attacker, neighbour):
        peer_id = server_of(attacker)
        async with neighbour.open_session(peer_id, open_request(max_length=100_000), 10) as session:
            for _ in range(TOLERATED_OFFENCES + 1):
                await answer_to(attacker, garbage(randomness))
            with trio.fail_after(5):
                while attacker.connected_peers:  # noqa: ASYNC110 - a network tells nobody
                    await trio.sleep(0.01)
            with pytest.raises((ConnectionLost, PeerUnreachable)):
                await answer_to_call(attacker, peer_id)
            assert await step(session, 0, 0, [1]) == [1]


async def answer_to_call(attacker: Network, peer_id: PeerId) -> None:
    """The refusal of a connection shows when it is used."""
    stream = await attacker.open_stream(peer_id, RPC_PROTOCOL)
    await FramedStream(stream).send(InfoRequest())
    if await FramedStream(stream).receive() is None:
        raise ConnectionLost("it was closed", peer_id)


@pytest.mark.own_process
async def test_half_open_streams_come_and_go_without_a_trace() -> None:
    async with open_server() as (server, service, attacker, neighbour):
        peer_id = server_of(attacker)
        process = psutil.Process(os.getpid())
        rss_bytes = []
        async with neighbour.open_session(peer_id, open_request(max_length=1000), 10) as session:
            for round_index in range(5):
                streams = [await attacker.open_stream(peer_id, RPC_PROTOCOL) for _ in range(100)]
                for stream in streams[:60]:
                    await stream.write(struct.pack("!II", 64 << 20, 1) + b"\x80" + bytes(10_000))
                assert server.statistics().num_streams <= 65
                with trio.fail_after(10):
                    while server.statistics().num_streams > 1:  # noqa: ASYNC110 - the server has no event for it
                        await trio.sleep(0.1)
                assert await step(session, round_index, round_index, [1]) == [round_index + 1]
                del streams, stream
                gc.collect()
                rss_bytes.append(process.memory_info().rss)
        assert rss_bytes[-1] - rss_bytes[1] < 4 << 20
        assert service.num_opened == 1
