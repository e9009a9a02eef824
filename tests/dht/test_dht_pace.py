"""How fast a node of the DHT answers: a peer that asks too fast waits, all together wait, and streams take turns."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio

from p2pswarm.core.ids import PeerId
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.incoming import IncomingStreams
from p2pswarm.dht.links import FramedDhtStream
from p2pswarm.dht.messages import DHT_PROTOCOL, Envelope, Ping, Pong, Request, Store, Stored
from p2pswarm.dht.record import KEY_BYTES, make_record
from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Network
from p2pswarm.testing.memory_network import Link, MemoryNetwork

CONFIG = DhtConfig(requests_per_s_per_peer=10, request_burst_per_peer=5, requests_per_s=20)
"""Two seconds of the last are saved up: 40 requests."""


async def answer(peer_id: PeerId, request: Envelope) -> Envelope:
    return Envelope(Pong() if isinstance(request.message, Ping) else Stored(()))


@asynccontextmanager
async def asking(num_peers: int, config: DhtConfig = CONFIG) -> AsyncIterator[list[FramedDhtStream]]:
    """A stream of each peer to one node."""
    memory = MemoryNetwork(Random(1), Link(latency_s=0.0))
    async with memory.node(0) as serving, trio.open_nursery() as nursery:
        serving.serve(DHT_PROTOCOL, IncomingStreams(answer, config).handle)
        ready: list[FramedDhtStream] = []

        async def stay(number: int, *, task_status: trio.TaskStatus[None]) -> None:
            async with memory.node(number) as network:
                ready.append(await open_stream(network, serving))
                task_status.started()
                await trio.sleep_forever()

        for number in range(1, num_peers + 1):
            await nursery.start(stay, number)
        yield ready
        nursery.cancel_scope.cancel()


async def open_stream(network: Network, serving: Network) -> FramedDhtStream:
    await network.connect(serving.addresses[0])
    return FramedDhtStream(await network.open_stream(serving.peer_id, DHT_PROTOCOL))


async def ask(stream: FramedDhtStream, request: Request, times: int) -> float:
    """How long it took."""
    began_at_s = trio.current_time()
    for _ in range(times):
        await stream.send(Envelope(request))
        assert await stream.receive() is not None
    return trio.current_time() - began_at_s


@pytest.mark.usefixtures("autojump_clock")
async def test_a_peer_that_asks_too_fast_waits() -> None:
    async with asking(1) as [stream]:
        assert await ask(stream, Ping(), 5) == pytest.approx(0, abs=0.05)
        assert await ask(stream, Ping(), 20) == pytest.approx(2, abs=0.1)


@pytest.mark.usefixtures("autojump_clock")
async def test_records_cost_more_than_questions() -> None:
    record = make_record(Identity.generate(), bytes(KEY_BYTES), b"value", 1, 1000.0)
    async with asking(1) as [stream]:
        assert await ask(stream, Store((record,) * 36), 5) == pytest.approx(4.5, abs=0.1)


@pytest.mark.usefixtures("autojump_clock")
async def test_all_together_wait_and_a_newcomer_no_longer_than_one_turn() -> None:
    config = DhtConfig(requests_per_s_per_peer=1000, request_burst_per_peer=1000, requests_per_s=20)
    async with asking(5, config) as [newcomer, *greedy], trio.open_nursery() as nursery:
        for stream in greedy:
            nursery.start_soon(ask, stream, Ping(), 1000)
        await trio.sleep(5)
        assert 0 < await ask(newcomer, Ping(), 1) <= 5 / 20 + 0.01
        nursery.cancel_scope.cancel()
