"""Batches and gradients as large as frames, over real sockets: exact, in pieces, and gone when they are answered."""

import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import psutil
import pytest
import trio

from p2pswarm.core.ids import PeerId
from p2pswarm.core.span import Span
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.rpc_world import open_request, step
from p2pswarm.testing.running_sum_service import SUM_MODEL, RunningSumService
from p2pswarm.wire.messages import Backward, BackwardReply, WireTensor
from p2pswarm.wire.tuning import TunedLayer, WireTuning

pytestmark = pytest.mark.real

SPAN = Span(0, 4)
MIB = 1 << 20
TIMEOUT_S = 60.0


class EchoService(RunningSumService):
    """Answers a backward with the gradients that came, and sessions as ever."""

    async def backward(self, peer_id: PeerId, request: Backward) -> BackwardReply:
        return BackwardReply(request.grad_outputs, request.tuning)


@asynccontextmanager
async def open_pair() -> AsyncIterator[tuple[RpcServer, PeerId, RpcClient]]:
    """A server, and a client with one connection to it."""
    async with (
        open_network(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as serving,
        open_network(Identity.generate()) as calling,
        trio.open_nursery() as nursery,
    ):
        server = RpcServer(serving, EchoService(max_length=1_000_000))

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            await server.run(task_status=task_status)

        await nursery.start(serve)
        await calling.connect(serving.addresses[0])
        yield server, serving.peer_id, RpcClient(calling)
        nursery.cancel_scope.cancel()


def a_full_frame() -> Backward:
    """28 MiB of hidden states, as much of gradients, and a tuning of 6 MiB."""
    tokens = WireTensor("float32", (8, 128, 7168), os.urandom(28 * MIB))
    pairs = [
        TunedLayer(
            block,
            "self_attn.q_proj",
            WireTensor("float32", (16, 7168), os.urandom(16 * 7168 * 4)),
            WireTensor("float32", (7168, 16), os.urandom(16 * 7168 * 4)),
        )
        for block in range(4)
    ]
    prompts = WireTensor("float32", (4, 16, 7168), os.urandom(4 * 16 * 7168 * 4))
    tuning = WireTuning(prompts, tuple(pairs))
    return Backward(SUM_MODEL, SPAN, tokens, replace(tokens, data=os.urandom(28 * MIB)), tuning=tuning)


async def test_the_largest_backward_comes_back_exact_while_a_session_beside_it_goes_on() -> None:
    request = a_full_frame()
    async with open_pair() as (_, peer_id, client):
        async with client.open_session(peer_id, open_request(max_length=1_000_000), TIMEOUT_S) as session:
            num_steps = 0
            is_done = False

            async def step_on() -> None:
                nonlocal num_steps
                while not is_done:
                    assert await step(session, num_steps, num_steps, [1]) == [num_steps + 1]
                    num_steps += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(step_on)
                reply = await client.backward(peer_id, request, TIMEOUT_S)
                num_steps_beside = num_steps
                is_done = True
        assert reply == BackwardReply(request.grad_outputs, request.tuning)
        assert num_steps_beside >= 5


async def test_large_backwards_leave_no_memory_behind() -> None:
    request = a_full_frame()
    process = psutil.Process(os.getpid())
    async with open_pair() as (server, peer_id, client):
        rss_bytes = []
        for _ in range(6):
            await client.backward(peer_id, request, TIMEOUT_S)
            with trio.fail_after(TIMEOUT_S):
                while server.statistics().received_bytes:  # noqa: ASYNC110 - the server announces this to nobody
                    await trio.sleep(0.01)
            gc.collect()
            rss_bytes.append(process.memory_info().rss)
        assert rss_bytes[-1] - rss_bytes[1] < 32 * MIB  # half of what one of them takes
