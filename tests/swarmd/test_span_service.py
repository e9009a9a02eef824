"""What a server answers over a network, what it refuses, and that a refusal harms nobody."""

import gc
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import psutil
import pytest
import torch
import trio
from span_world import HIDDEN_SIZE, SPAN, STEP_IDS, TIMEOUT_S, SpanWorld, open_span_world, run_step, step_of
from trio.testing import MockClock

from p2pswarm.blocks.pages import PAGE_TOKENS
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.core.errors import RequestRefused, ServerBusy, SessionLost, SwarmingError
from p2pswarm.core.ids import ModelId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.net.network import Network
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.limits import RPC_PROTOCOL
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import Codec, InfoReply, Step
from swarmd.handler import Served
from swarmd.scheduling.work import Kind

CACHE_TOKENS = 8 * PAGE_TOKENS
MAX_LENGTH = 64
MIB = 1 << 20


@pytest.fixture
async def world(tiny_checkpoint: Checkpoint, tiny_span: SpanModel) -> AsyncIterator[SpanWorld]:
    pool = tiny_span.new_pool(CACHE_TOKENS // PAGE_TOKENS)
    async with open_span_world(Served(tiny_checkpoint.model_id, tiny_span, pool, MAX_LENGTH), describe) as opened:
        yield opened


def describe(world: SpanWorld) -> InfoReply:
    info = server_info(world.server, world.model_id)
    return InfoReply(replace(info, cache_tokens_left=world.service.memory.tokens_left))


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


async def test_a_session_computes_what_the_model_does(
    autojump_clock: MockClock, world: SpanWorld, tiny_span: SpanModel
) -> None:
    hidden_states = torch.randn(1, 12, HIDDEN_SIZE)
    cache = tiny_span.new_cache(1)
    async with world.client() as client, world.session(client) as session:
        for start, end in ((0, 7), (7, 8), (8, 12)):
            new = hidden_states[:, start:end]
            expected = tiny_span.run(new, cache, position=start)
            assert torch.equal(await run_step(session, new, start), expected)


async def test_a_session_over_a_part_of_the_span_runs_just_that_part(
    autojump_clock: MockClock, world: SpanWorld, tiny_span: SpanModel
) -> None:
    hidden_states = torch.randn(1, 3, HIDDEN_SIZE)
    expected = tiny_span.run(hidden_states, None, position=0, blocks=Span(3, 5))
    async with world.client() as client, world.session(client, span=Span(3, 5)) as session:
        torch.testing.assert_close(await run_step(session, hidden_states, 0), expected)
        assert world.service.memory.tokens_left == CACHE_TOKENS - PAGE_TOKENS


@pytest.mark.parametrize(("most_tokens", "num_parts"), [(10, 3), (9, 3), (4, 5), (3, 10), (1, 20)])
async def test_forward_runs_rows_together_and_long_ones_in_pieces(
    most_tokens: int, num_parts: int, autojump_clock: MockClock, world: SpanWorld, tiny_span: SpanModel
) -> None:
    world.service.dispatcher.costs.tokens_within = lambda kind, time_s: most_tokens
    hidden_states = torch.randn(5, 4, HIDDEN_SIZE)
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[3, :2] = False
    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
    expected = tiny_span.run(hidden_states, None, position=0, attention_mask=mask, position_ids=position_ids)
    async with world.client() as client:
        answer = await world.forward(
            client, hidden_states, attention_mask=encode_tensor(mask), position_ids=encode_tensor(position_ids)
        )
    torch.testing.assert_close(answer[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert world.service.dispatcher.statistics().num_parts == {Kind.FORWARD: num_parts}
    assert world.service.memory.tokens_left == CACHE_TOKENS


async def test_answers_come_in_the_dtype_and_codec_of_the_request(
    autojump_clock: MockClock, world: SpanWorld, tiny_span: SpanModel
) -> None:
    hidden_states = torch.randn(1, 4, HIDDEN_SIZE)
    async with world.client() as client:
        whole = await world.forward(client, hidden_states)
        packed = await world.forward(client, hidden_states, codec=Codec.FLOAT16)
        assert torch.equal(packed, whole.half().float())
        short = await world.forward(client, hidden_states.bfloat16())
        assert short.dtype is torch.bfloat16


async def test_room_is_taken_as_tokens_come_and_comes_back_at_the_end(
    autojump_clock: MockClock, world: SpanWorld
) -> None:
    async with world.client() as client:
        async with world.session(client, batch_size=2, max_length=60, first_tokens=3) as session:
            told = await client.info(world.server.peer_id, TIMEOUT_S)
            assert told.info.cache_tokens_left == CACHE_TOKENS - 2 * PAGE_TOKENS
            await run_step(session, torch.randn(2, 3, HIDDEN_SIZE), 0)
            assert world.service.memory.tokens_left == CACHE_TOKENS - 2 * PAGE_TOKENS
            await run_step(session, torch.randn(2, PAGE_TOKENS, HIDDEN_SIZE), 3)
            assert world.service.memory.tokens_left == CACHE_TOKENS - 4 * PAGE_TOKENS
            await run_step(session, torch.randn(2, 1, HIDDEN_SIZE), 1)
            assert world.service.memory.tokens_left == CACHE_TOKENS - 2 * PAGE_TOKENS
        await trio.sleep(1)
        assert world.service.memory.tokens_left == CACHE_TOKENS


async def test_a_session_waits_for_room_as_long_as_its_client_says(autojump_clock: MockClock, world: SpanWorld) -> None:
    async with world.client() as client:
        async with world.session(client, batch_size=8) as first:
            await run_step(first, torch.randn(8, 3, HIDDEN_SIZE), 0)
            began_at_s = trio.current_time()
            with pytest.raises(ServerBusy, match="no room for 9 tokens of KV cache within 2 s: 0 of 256 are left"):
                async with world.session(client, first_tokens=9, alloc_timeout_s=2.0):
                    pass
            assert trio.current_time() - began_at_s == pytest.approx(2.0, abs=0.5)
            with pytest.raises(ServerBusy, match="no room for 9 x 32 tokens"):
                async with world.session(client, batch_size=9, alloc_timeout_s=2.0):
                    pass

            async def open_another() -> None:
                async with world.session(client, first_tokens=9, alloc_timeout_s=20.0) as second:
                    await run_step(second, torch.randn(1, 9, HIDDEN_SIZE), 0)
                    opened_at_s.append(trio.current_time())

            opened_at_s: list[float] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(open_another)
                await trio.sleep(10)
                assert not opened_at_s
                first.close()
        assert opened_at_s[0] - began_at_s == pytest.approx(12.0, abs=0.5)


async def test_the_youngest_session_makes_room_for_the_oldest(
    autojump_clock: MockClock, world: SpanWorld, tiny_span: SpanModel
) -> None:
    hidden_states = torch.randn(4, 40, HIDDEN_SIZE)
    expected = tiny_span.run(hidden_states, None, position=0)
    async with (
        world.client() as client,
        world.session(client, batch_size=4, max_length=40) as oldest,
        world.session(client, batch_size=1) as middle,
        world.session(client, batch_size=1) as youngest,
    ):
        await run_step(oldest, hidden_states[:, :30], 0)
        for session in (middle, youngest):
            await run_step(session, torch.randn(1, 3, HIDDEN_SIZE), 0)
        answer = await run_step(oldest, hidden_states[:, 30:32], 30)
        torch.testing.assert_close(answer, expected[:, 30:32], rtol=1e-4, atol=1e-5)
        answer = await run_step(oldest, hidden_states[:, 32:], 32)
        torch.testing.assert_close(answer, expected[:, 32:], rtol=1e-4, atol=1e-5)
        for session in (middle, youngest):
            with pytest.raises(SessionLost, match="memory was full"):
                await run_step(session, torch.randn(1, 1, HIDDEN_SIZE), 3)
    await trio.sleep(1)
    assert world.service.memory.tokens_left == CACHE_TOKENS


async def test_a_client_that_vanishes_gives_its_room_back(autojump_clock: MockClock, world: SpanWorld) -> None:
    async with world.client() as client, world.session(client) as session:
        await run_step(session, torch.randn(1, 2, HIDDEN_SIZE), 0)
    await trio.sleep(1)
    assert world.service.memory.tokens_left == CACHE_TOKENS
    assert world.service.memory.num_tenants == 0


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
    autojump_clock: MockClock, world: SpanWorld, changes: dict[str, object], complaint: str
) -> None:
    async with world.client() as client:
        with pytest.raises(RequestRefused, match=complaint):
            async with world.session(client, **changes):
                pass
        assert world.service.memory.tokens_left == CACHE_TOKENS


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
    autojump_clock: MockClock, world: SpanWorld, tiny_span: SpanModel, bad: Step, complaint: str
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


async def misbehave(world: SpanWorld, client: RpcClient, network: Network) -> None:
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


@pytest.mark.own_process
async def test_strangers_misbehaving_do_not_disturb_a_session_nor_take_memory(
    autojump_clock: MockClock, world: SpanWorld, tiny_span: SpanModel
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
    assert world.service.memory.tokens_left == CACHE_TOKENS
    assert rss_bytes[1] - rss_bytes[0] < 8 * MIB


async def test_a_hundred_half_open_sessions_leave_room_for_an_honest_one(
    autojump_clock: MockClock, world: SpanWorld
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


async def test_a_hung_client_does_not_keep_its_room_for_ever(autojump_clock: MockClock, world: SpanWorld) -> None:
    async with world.client() as client, world.session(client) as session:
        await run_step(session, torch.randn(1, 2, HIDDEN_SIZE), 0)
        (client_peer,) = world.server.connected_peers
        world.memory.hang(client_peer)
        await trio.sleep(60)
        assert world.service.memory.tokens_left == CACHE_TOKENS
        world.memory.resume(client_peer)
