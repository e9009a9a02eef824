"""Servers that push to one another over real sockets, having learned of each other from their client alone."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from p2pswarm.core.ids import SessionId
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.rpc_world import TIMEOUT_S, open_request
from p2pswarm.testing.running_sum_service import RunningSumService, read_rows, wire_rows
from p2pswarm.wire.messages import NextHop, PushedStep, Step

pytestmark = pytest.mark.real


@asynccontextmanager
async def open_sessions(num_servers: int) -> AsyncIterator[tuple[list[RemoteSession], list[NextHop]]]:
    """A session at each of the servers, and where to push to each of them."""
    async with AsyncExitStack() as stack:
        networks = [
            await stack.enter_async_context(open_network(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]))
            for _ in range(num_servers)
        ]
        async with open_network(Identity.generate()) as client_network, trio.open_nursery() as nursery:
            client = RpcClient(client_network)
            sessions, hops = [], []
            for index, network in enumerate(networks):
                server = RpcServer(network, RunningSumService())
                nursery.start_soon(server.run)
                await client_network.connect(network.addresses[0])
                request = open_request(f"s{index}")
                sessions.append(
                    await stack.enter_async_context(client.open_session(network.peer_id, request, TIMEOUT_S))
                )
                hops.append(NextHop(network.peer_id, SessionId(f"s{index}"), network.addresses))
            yield sessions, hops
            nursery.cancel_scope.cancel()


async def test_a_chain_of_pushes_is_exact() -> None:
    async with open_sessions(3) as (sessions, hops):
        sums = [0.0] * 3
        for step_id in range(50):
            first = Step(step_id, step_id, wire_rows([[float(step_id)]]), push_to=hops[1])
            steps = [first, PushedStep(step_id, step_id, 1, push_to=hops[2]), PushedStep(step_id, step_id, 1)]
            token = float(step_id)
            for session, step in zip(sessions, steps, strict=True):
                await session.send(step)
            for index, (session, step) in enumerate(zip(sessions, steps, strict=True)):
                reply = await session.receive(step, TIMEOUT_S)
                sums[index] += token
                token = sums[index]
                assert read_rows(reply.hidden_states) == [[token]]
                assert reply.from_push == (index > 0)
