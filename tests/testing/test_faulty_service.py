"""A faulty service is the service it wraps until it is told to fail; each fault looks to a client as it says."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import BadAnswer, DeadlineExceeded, RequestRefused, ServerBusy, ServerFailed, SwarmingError
from p2pswarm.core.ids import PeerId, SessionId
from p2pswarm.core.span import Span
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.arithmetic_model import (
    ARITHMETIC_MODEL,
    ArithmeticService,
    Tokens,
    arithmetic_server_info,
    run_blocks,
    run_blocks_back,
)
from p2pswarm.testing.faulty_service import Fault, FaultyService
from p2pswarm.testing.memory_network import MemoryNetwork
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import Backward, Codec, Forward, OpenSession, Step

BLOCKS = Span(1, 3)
INFO = arithmetic_server_info(PeerId("server"), BLOCKS, num_model_blocks=6)
TOKENS = torch.tensor([[[1.0], [2.0], [3.0]]])
TIMEOUT_S = 5.0


@asynccontextmanager
async def open_session(service: FaultyService, codec: Codec = Codec.NONE) -> AsyncIterator[RemoteSession]:
    memory = MemoryNetwork(random.Random(1))
    async with memory.node(1) as node, memory.node(2) as network, trio.open_nursery() as tasks:
        await tasks.start(RpcServer(node, service).run)
        await network.connect(node.addresses[0])
        request = OpenSession(SessionId("session"), ARITHMETIC_MODEL, BLOCKS, 100, 1, codec)
        async with RpcClient(network).open_session(node.peer_id, request, TIMEOUT_S) as session:
            yield session
        tasks.cancel_scope.cancel()


async def step(session: RemoteSession, step_id: int, position: int) -> torch.Tensor:
    wire = encode_tensor(TOKENS, session.request.codec)
    return decode_tensor((await session.step(Step(step_id, position, wire), TIMEOUT_S)).hidden_states)


def expected(tokens: torch.Tensor) -> torch.Tensor:
    return run_blocks(BLOCKS, Tokens.none(tokens.shape[0]).followed_by(tokens, None, None))


async def test_it_answers_as_the_service_does_until_it_fails_and_after_it_is_mended(autojump_clock: MockClock) -> None:
    service = FaultyService(ArithmeticService(INFO))
    async with open_session(service) as session:
        first = await step(session, 0, 0)
        service.fault = Fault.IS_BUSY
        with pytest.raises(ServerBusy):
            await step(session, 1, 3)
        service.fault = None
        assert torch.equal(torch.cat([first, await step(session, 2, 3)], 1), expected(torch.cat([TOKENS, TOKENS], 1)))
        assert service.num_faults_shown == 1


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault.HANGS, DeadlineExceeded, "did not answer a step within 5 s"),
        (Fault.FAILS, ServerFailed, "the server failed"),
        (Fault.REFUSES, RequestRefused, "made to refuse"),
        (Fault.WRONG_SHAPE, BadAnswer, r"shape \[1, 4, 1\]"),
        (Fault.WRONG_POSITION, BadAnswer, "position 4 to 3 tokens from 0 on"),
        (Fault.OTHER_STEP, BadAnswer, "step 1, not 0"),
    ],
)
async def test_each_fault_is_the_error_that_it_should_be(
    fault: Fault, error: type[SwarmingError], message: str, autojump_clock: MockClock
) -> None:
    service = FaultyService(ArithmeticService(INFO))
    async with open_session(service) as session:
        service.fault = fault
        with pytest.raises(error, match=message):
            await step(session, 0, 0)
        assert service.num_faults_shown == 1


@pytest.mark.parametrize("codec", Codec)
async def test_nan_gets_through_every_codec(codec: Codec, autojump_clock: MockClock) -> None:
    service = FaultyService(ArithmeticService(INFO))
    async with open_session(service, codec) as session:
        service.fault = Fault.NOT_FINITE
        assert (await step(session, 0, 0)).isnan().all()


async def test_a_hang_that_ends_lets_the_answer_come(autojump_clock: MockClock) -> None:
    service = FaultyService(ArithmeticService(INFO))
    async with open_session(service) as session, trio.open_nursery() as nursery:
        service.fault = Fault.HANGS

        async def mend() -> None:
            await trio.sleep(TIMEOUT_S / 2)
            service.fault = None

        nursery.start_soon(mend)
        assert torch.equal(await step(session, 0, 0), expected(TOKENS))


async def test_batches_without_a_session_show_the_faults_too() -> None:
    service = FaultyService(ArithmeticService(INFO))
    request = Forward(ARITHMETIC_MODEL, BLOCKS, encode_tensor(TOKENS))
    reply = await service.forward("a peer", request)
    assert torch.equal(decode_tensor(reply.hidden_states), expected(TOKENS))
    service.fault = Fault.WRONG_SHAPE
    assert (await service.forward("a peer", request)).hidden_states.shape == (1, 4, 1)


async def test_gradients_show_the_faults_too() -> None:
    service = FaultyService(ArithmeticService(INFO))
    wire = encode_tensor(TOKENS)
    request = Backward(ARITHMETIC_MODEL, BLOCKS, wire, wire)
    wanted, _ = run_blocks_back(BLOCKS, Tokens.none(1).followed_by(TOKENS, None, None), TOKENS)
    assert torch.equal(decode_tensor((await service.backward("a peer", request)).grad_inputs), wanted)
    service.fault = Fault.NOT_FINITE
    assert decode_tensor((await service.backward("a peer", request)).grad_inputs).isnan().all()
    service.fault = Fault.IS_BUSY
    with pytest.raises(ServerBusy):
        await service.backward("a peer", request)
