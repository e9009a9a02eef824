"""What a server answers over a network, what it refuses, and that a refusal harms nobody."""

import gc
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace

import psutil
import pytest
import torch
import trio
from trio.testing import MockClock

from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.core.errors import RequestRefused, ServerBusy, SwarmingError
from p2pswarm.core.ids import ModelId, SessionId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.net.network import Network
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.limits import RPC_PROTOCOL
from p2pswarm.rpc.remote_session import RemoteSession
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.memory_network import MemoryNetwork
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import Codec, Forward, InfoReply, OpenSession, Step
from swarmd.device_thread import InlineDevice
from swarmd.handler import Served, SpanService
from swarmd.memory import CacheBudget

SPAN = Span(2, 6)
HIDDEN_SIZE = 64
CACHE_TOKENS = 256
MAX_LENGTH = 64
TIMEOUT_S = 30.0
MIB = 1 << 20
STEP_IDS = itertools.count()
SESSION_NUMBERS = itertools.count()


@dataclass
class World:
    """A server of blocks 2:6 and whoever asks it something."""

    memory: MemoryNetwork
    server: Network
    rpc: RpcServer
    budget: CacheBudget
    model_id: ModelId

    @asynccontextmanager
    async def client(self, seed: int = 2) -> AsyncIterator[RpcClient]:
        async with self.memory.node(seed, listens=False) as network:
            await network.connect(self.server.addresses[0])
            client = RpcClient(network)
            yield client
            client.close()

    def session(self, client: RpcClient, **changes: object) -> AbstractAsyncContextManager[RemoteSession]:
        request = OpenSession(
            SessionId(f"session-{next(SESSION_NUMBERS)}"), self.model_id, SPAN, max_length=32, batch_size=1
        )
        return client.open_session(self.server.peer_id, replace(request, **changes), TIMEOUT_S)

    async def forward(self, client: RpcClient, hidden_states: torch.Tensor, **changes: object) -> torch.Tensor:
        request = Forward(self.model_id, SPAN, encode_tensor(hidden_states))
        reply = await client.forward(self.server.peer_id, replace(request, **changes), TIMEOUT_S)
        return decode_tensor(reply.hidden_states)


@pytest.fixture
async def world(tiny_checkpoint: Checkpoint, tiny_span: SpanModel) -> AsyncIterator[World]:
    memory = MemoryNetwork(random.Random(7))
    budget = CacheBudget(CACHE_TOKENS, SPAN.num_blocks)
    async with memory.node(1) as network, open_transparent_nursery() as nursery:
        served = Served(tiny_checkpoint.model_id, tiny_span, MAX_LENGTH)
        info = server_info(network, tiny_checkpoint.model_id)

        def describe() -> InfoReply:
            return InfoReply(replace(info, cache_tokens_left=budget.tokens_left))

        rpc = RpcServer(network, SpanService(served, InlineDevice(), budget, describe))
        await nursery.start(rpc.run)
        yield World(memory, network, rpc, budget, tiny_checkpoint.model_id)
        nursery.cancel_scope.cancel()


def server_info(network: Network, model_id: ModelId) -> ServerInfo:
    return ServerInfo(
        peer_id=network.peer_id,
        model_id=model_id,
        span=SPAN,
        state=ServerState.ONLINE,
        addresses=network.addresses,
        num_model_blocks=8,
        throughput_tokens_per_s=1.0,
        inference_tokens_per_s=1.0,
        forward_tokens_per_s=1.0,
        network_tokens_per_s=1.0,
        dtype="float32",
        max_length=MAX_LENGTH,
    )


def step_of(hidden_states: torch.Tensor, position: int, **more: torch.Tensor) -> Step:
    parts = {name: encode_tensor(part) for name, part in more.items()}
    return Step(next(STEP_IDS), position, encode_tensor(hidden_states), **parts)


async def run_step(
    session: RemoteSession, hidden_states: torch.Tensor, position: int, **more: torch.Tensor
) -> torch.Tensor:
    reply = await session.step(step_of(hidden_states, position, **more), TIMEOUT_S)
    return decode_tensor(reply.hidden_states)


async def test_a_session_computes_what_the_model_does(
    autojump_clock: MockClock, world: World, tiny_span: SpanModel
) -> None:
    hidden_states = torch.randn(1, 12, HIDDEN_SIZE)
    cache = tiny_span.new_cache(1)
    async with world.client() as client, world.session(client) as session:
        for start, end in ((0, 7), (7, 8), (8, 12)):
            new = hidden_states[:, start:end]
            expected = tiny_span.run(new, cache, position=start)
            assert torch.equal(await run_step(session, new, start), expected)


async def test_a_session_over_a_part_of_the_span_runs_just_that_part(
    autojump_clock: MockClock, world: World, tiny_span: SpanModel
) -> None:
    hidden_states = torch.randn(1, 3, HIDDEN_SIZE)
    expected = tiny_span.run(hidden_states, None, position=0, blocks=Span(3, 5))
    async with world.client() as client, world.session(client, span=Span(3, 5)) as session:
        torch.testing.assert_close(await run_step(session, hidden_states, 0), expected)
        assert world.budget.tokens_left == CACHE_TOKENS - 16


async def test_forward_runs_long_batches_in_parts(
    autojump_clock: MockClock, world: World, tiny_span: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmd.handler.MAX_TOKENS_AT_ONCE", 10)
    hidden_states = torch.randn(5, 4, HIDDEN_SIZE)
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[3, :2] = False
    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
    expected = tiny_span.run(hidden_states, None, position=0, attention_mask=mask, position_ids=position_ids)
    async with world.client() as client:
        answer = await world.forward(
            client, hidden_states, attention_mask=encode_tensor(mask), position_ids=encode_tensor(position_ids)
        )
    torch.testing.assert_close(answer[mask], expected[mask])


async def test_answers_come_in_the_dtype_and_codec_of_the_request(
    autojump_clock: MockClock, world: World, tiny_span: SpanModel
) -> None:
    hidden_states = torch.randn(1, 4, HIDDEN_SIZE)
    async with world.client() as client:
        whole = await world.forward(client, hidden_states)
        packed = await world.forward(client, hidden_states, codec=Codec.FLOAT16)
        assert torch.equal(packed, whole.half().float())
        short = await world.forward(client, hidden_states.bfloat16())
        assert short.dtype is torch.bfloat16


async def test_room_is_promised_at_open_and_comes_back_at_the_end(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        async with world.session(client, batch_size=4, max_length=60):
            assert world.budget.tokens_left == 16
            with pytest.raises(ServerBusy, match="no room for 32 tokens"):
                async with world.session(client):
                    pass
            told = await client.info(world.server.peer_id, TIMEOUT_S)
            assert told.info.cache_tokens_left == 16
        await trio.sleep(1)
        assert world.budget.tokens_left == CACHE_TOKENS


async def test_a_client_that_vanishes_gives_its_room_back(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, world.session(client) as session:
        await run_step(session, torch.randn(1, 2, HIDDEN_SIZE), 0)
    await trio.sleep(1)
    assert world.budget.tokens_left == CACHE_TOKENS
    assert world.budget.num_reservations == 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_id": ModelId("gpt2@0123456789abcdef")}, "this server has model tiny@.*, asked was gpt2@"),
        ({"model_id": ModelId("tiny@0123456789abcdef")}, "the same name, but other weights or another config"),
        ({"span": Span(1, 4)}, "this server has blocks 2:6, asked were 1:4"),
        ({"span": Span(5, 7)}, "this server has blocks 2:6, asked were 5:7"),
        ({"max_length": 65}, "sessions of up to 64 tokens, asked were 65"),
        ({"adapter": "poet"}, "no adapters, asked was poet"),
    ],
)
async def test_a_session_that_cannot_be_is_refused(
    autojump_clock: MockClock, world: World, changes: dict[str, object], complaint: str
) -> None:
    async with world.client() as client:
        with pytest.raises(RequestRefused, match=complaint):
            async with world.session(client, **changes):
                pass
        assert world.budget.tokens_left == CACHE_TOKENS


def spoilt(value: float) -> torch.Tensor:
    hidden_states = torch.randn(1, 1, HIDDEN_SIZE)
    hidden_states[0, 0, 17] = value
    return hidden_states


BAD_STEPS = [
    (step_of(torch.randn(1, 1, 32), 4), "hidden states of size 64, got shape"),
    (step_of(torch.randn(2, 1, HIDDEN_SIZE), 4), "batch size 1, got shape"),
    (step_of(torch.randn(1, 1, HIDDEN_SIZE), 5), "position 5 is beyond the 4 tokens"),
    (step_of(torch.randn(1, 29, HIDDEN_SIZE), 4), "position 4 and 29 new tokens exceed this session's 32"),
    (step_of(spoilt(float("nan")), 4), "NaN or infinity"),
    (step_of(spoilt(float("-inf")), 2), "NaN or infinity"),
    (step_of(spoilt(1.0), 4, position_ids=torch.tensor([[64]])), "position_ids go from 0 up to 63 here, got 64"),
    (step_of(spoilt(1.0), 4, position_ids=torch.tensor([[-1]])), "position_ids go from 0 up to 63"),
    (step_of(spoilt(1.0), 4, beam_indices=torch.tensor([1])), "beam_indices go from 0 up to 0 here, got 1 to 1"),
]


@pytest.mark.parametrize(("bad", "complaint"), BAD_STEPS)
async def test_a_refused_step_changes_nothing(
    autojump_clock: MockClock, world: World, tiny_span: SpanModel, bad: Step, complaint: str
) -> None:
    hidden_states = torch.randn(1, 6, HIDDEN_SIZE)
    cache = tiny_span.new_cache(1)
    tiny_span.run(hidden_states[:, :4], cache, position=0)
    expected = tiny_span.run(hidden_states[:, 4:], cache, position=4)
    async with world.client() as client, world.session(client) as session:
        await run_step(session, hidden_states[:, :4], 0)
        with pytest.raises(RequestRefused, match=complaint):
            await session.step(replace(bad, step_id=next(STEP_IDS)), TIMEOUT_S)
        assert torch.equal(await run_step(session, hidden_states[:, 4:], 4), expected)


async def misbehave(world: World, client: RpcClient, network: Network) -> None:
    """One of everything that strangers do wrong."""
    other_model = ModelId("tiny@0123456789abcdef")
    for changes in ({"model_id": other_model}, {"span": Span(0, 8)}, {"max_length": 1 << 20}, {"batch_size": 1 << 16}):
        with pytest.raises(SwarmingError):
            async with world.session(client, **changes):
                pass
    with pytest.raises(RequestRefused):
        await world.forward(client, torch.full((8, 16, HIDDEN_SIZE), float("nan")))
    with pytest.raises(RequestRefused):
        await world.forward(client, torch.randn(1, MAX_LENGTH + 1, HIDDEN_SIZE))
    async with world.session(client, max_length=8) as session:
        await run_step(session, torch.randn(1, 4, HIDDEN_SIZE), 0)
        for bad, _ in BAD_STEPS[:4]:
            with pytest.raises(RequestRefused):
                await session.step(replace(bad, step_id=next(STEP_IDS)), TIMEOUT_S)
    for garbage in (b"\x00\x00\x00", b"\xff" * 64, random.Random(3).randbytes(4096)):
        stream = await network.open_stream(world.server.peer_id, RPC_PROTOCOL)
        await stream.write(garbage)
        await stream.close_write()
        stream.reset()


async def test_strangers_misbehaving_do_not_disturb_a_session_nor_take_memory(
    autojump_clock: MockClock, world: World, tiny_span: SpanModel
) -> None:
    process = psutil.Process()
    hidden_states = torch.randn(1, 30, HIDDEN_SIZE)
    cache = tiny_span.new_cache(1)
    rss_bytes = []
    async with (
        world.client(2) as honest,
        world.session(honest) as session,
        world.memory.node(3, listens=False) as network,
    ):
        await network.connect(world.server.addresses[0])
        stranger = RpcClient(network)
        for position in range(30):
            new = hidden_states[:, position : position + 1]
            expected = tiny_span.run(new, cache, position=position)
            assert torch.equal(await run_step(session, new, position), expected)
            for _ in range(4):
                await misbehave(world, stranger, network)
            if position in (9, 29):
                gc.collect()
                rss_bytes.append(process.memory_info().rss)
        stranger.close()
    await trio.sleep(1)
    assert world.rpc.statistics().num_sessions == 0
    assert world.budget.tokens_left == CACHE_TOKENS
    assert rss_bytes[1] - rss_bytes[0] < 8 * MIB


async def test_a_hundred_half_open_sessions_leave_room_for_an_honest_one(
    autojump_clock: MockClock, world: World
) -> None:
    async with (
        world.memory.node(3, listens=False) as one,
        world.memory.node(4, listens=False) as other,
        world.client(2) as honest,
    ):
        for stranger in (one, other):
            await stranger.connect(world.server.addresses[0])
            for _ in range(50):
                stream = await stranger.open_stream(world.server.peer_id, RPC_PROTOCOL)
                await stream.write(b"\x00\x00")
        async with world.session(honest) as session:
            await run_step(session, torch.randn(1, 3, HIDDEN_SIZE), 0)
            assert world.rpc.statistics().num_streams == 101
            await trio.sleep(60)
            assert world.rpc.statistics().num_streams == 1
            await run_step(session, torch.randn(1, 1, HIDDEN_SIZE), 3)


async def test_a_hung_client_does_not_keep_its_room_for_ever(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, world.session(client) as session:
        await run_step(session, torch.randn(1, 2, HIDDEN_SIZE), 0)
        (client_peer,) = world.server.connected_peers
        world.memory.hang(client_peer)
        await trio.sleep(60)
        assert world.budget.tokens_left == CACHE_TOKENS
        world.memory.resume(client_peer)
