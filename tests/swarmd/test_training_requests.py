"""What is refused of those who train, that it harms nobody, and that nothing of it stays."""

import gc
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
import trio
from span_world import HIDDEN_SIZE, SPAN, TIMEOUT_S, SpanWorld, open_span_world, run_step
from tiny_tunings import LAYERS, tuning_of, wired
from trio.testing import MockClock

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.blocks.pages import PAGE_TOKENS
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.core.errors import BadRequest, RequestRefused, ServerBusy
from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.core.span import Span
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import Backward, BackwardReply, Codec, Forward, OpenSession, Step
from swarmd.device_thread import InlineDevice
from swarmd.handler import Served, SpanService
from swarmd.scheduling.work import Kind

MAX_LENGTH = 64
CACHE_TOKENS = 32 * PAGE_TOKENS
KIB, MIB = 1 << 10, 1 << 20
TRAINING_BYTES = 1 * MIB
MAX_TUNING_BYTES = 40 * KIB
TRAINER = PeerId("trainer")


@pytest.fixture
async def world(tiny_checkpoint: Checkpoint, tiny_span: SpanModel) -> AsyncIterator[SpanWorld]:
    pool = tiny_span.new_pool(CACHE_TOKENS // PAGE_TOKENS)
    served = Served(tiny_checkpoint.model_id, tiny_span, pool, MAX_LENGTH, TRAINING_BYTES, MAX_TUNING_BYTES)
    async with open_span_world(served) as opened:
        yield opened


def spoilt(value: float) -> torch.Tensor:
    states = torch.randn(2, 6, HIDDEN_SIZE)
    states[1, 3, 17] = value
    return states


def pair(rank: int, inputs: int, outputs: int, value: float | None = None) -> LowRank:
    down, up = torch.randn(rank, inputs), torch.randn(outputs, rank)
    if value is not None:
        up[-1, -1] = value
    return LowRank(down, up)


def tuned(path: str, low_rank: LowRank, block: int = 3) -> Any:
    return wired(SpanTuning(SPAN, None, {block: {path: low_rank}}))


BAD_TUNINGS = [
    (lambda: tuned("self_attn.q_proj", pair(2, 32, 64)), r"\[2, 32\] and \[64, 2\], wanted \[rank, 64\] and \[64"),
    (lambda: tuned("self_attn.q_proj", pair(2, 64, 65)), r"wanted \[rank, 64\] and \[64, rank\]"),
    (lambda: tuned("self_attn.nothing", pair(2, 64, 64)), "no such layer, but self_attn.q_proj"),
    (lambda: tuned("input_layernorm", pair(2, 64, 64)), "only linear layers can be tuned"),
    (lambda: tuned("mlp.down_proj", pair(2, 128, 64, float("nan"))), "values that are not finite"),
    (lambda: tuned("mlp.down_proj", pair(2, 128, 64, float("inf"))), "values that are not finite"),
    (lambda: tuned("mlp.down_proj", pair(64, 128, 64)), r"tunings of up to 40 KiB a call or session .* 48 KiB"),
]


@pytest.mark.parametrize(("make", "complaint"), BAD_TUNINGS)
async def test_a_tuning_that_does_not_fit_is_refused_everywhere(
    make: Any, complaint: str, autojump_clock: MockClock, world: SpanWorld
) -> None:
    states = torch.randn(2, 6, HIDDEN_SIZE)
    tuning = make()
    async with world.client() as client:
        with pytest.raises(RequestRefused, match=complaint):
            await world.backward(client, world.backward_request(states, states, tuning=tuning))
        forward = Forward(world.model_id, SPAN, encode_tensor(states), tuning=tuning)
        with pytest.raises(RequestRefused, match=complaint):
            await client.forward(world.server.peer_id, forward, TIMEOUT_S)
        with pytest.raises(RequestRefused, match=complaint):
            async with world.session(client, tuning=tuning):
                pass
    assert (world.service.tunings.num_held, world.service.memory.tokens_left) == (0, CACHE_TOKENS)


def bad_requests(world: SpanWorld) -> list[tuple[Backward, str]]:
    fine = torch.randn(2, 6, HIDDEN_SIZE)
    good = world.backward_request(fine, fine)
    return [
        (world.backward_request(spoilt(float("nan")), fine), "hidden_states hold NaN or infinity"),
        (world.backward_request(fine, spoilt(float("nan"))), "grad_outputs hold NaN or infinity"),
        (world.backward_request(fine, spoilt(float("-inf"))), "grad_outputs hold NaN or infinity"),
        (
            world.backward_request(fine, fine.sign() * 3e38),
            "gradients hold NaN or infinity: .* too large to compute with in float32",
        ),
        (world.backward_request(torch.randn(2, 6, 32), torch.randn(2, 6, 32)), "hidden states of size 64, got shape"),
        (world.backward_request(torch.randn(2, 0, 64), torch.randn(2, 0, 64)), "sequences of 1 to 64 tokens, got 0"),
        (world.backward_request(torch.randn(1, 65, 64), torch.randn(1, 65, 64)), "sequences of 1 to 64 tokens, got 65"),
        (replace(good, span=Span(1, 4)), "this server has blocks 2:6, asked were 1:4"),
        (replace(good, model_id=ModelId("gpt2@0123456789abcdef")), "this server has model tiny@.*, asked was gpt2@"),
        (replace(good, adapter="poet"), "no adapters, asked was poet"),
        (replace(good, position_ids=encode_tensor(torch.full((2, 6), 64))), "position_ids go from 0 up to 63 here"),
    ]


async def test_bad_requests_are_refused_and_a_session_beside_them_stays_exact(
    autojump_clock: MockClock, world: SpanWorld
) -> None:
    hidden_states = torch.randn(1, 32, HIDDEN_SIZE)
    cache = world.model.new_cache(1)
    requests = bad_requests(world)
    async with world.client() as client, world.session(client) as session, world.client(3) as stranger:
        for position, (request, complaint) in zip(range(32), requests, strict=False):
            with pytest.raises(RequestRefused, match=complaint):
                await world.backward(stranger, request)
            new = hidden_states[:, position : position + 1]
            expected = world.model.run(new, cache, position=position)
            assert torch.equal(await run_step(session, new, position), expected)
        states, gradients = torch.randn(2, 3, 6, HIDDEN_SIZE)
        reply = await world.backward(stranger, world.backward_request(states, gradients))
        torch.testing.assert_close(
            decode_tensor(reply.grad_inputs), world.model.run_backward(states, gradients).inputs, rtol=1e-4, atol=1e-5
        )


async def test_a_row_too_long_for_the_memory_is_refused_and_a_shorter_one_is_not(
    autojump_clock: MockClock, tiny_checkpoint: Checkpoint, tiny_span: SpanModel
) -> None:
    served = Served(tiny_checkpoint.model_id, tiny_span, tiny_span.new_pool(4), MAX_LENGTH, training_bytes=300 * KIB)
    service = SpanService(served, InlineDevice(), lambda: pytest.fail("nobody asks"))
    states = torch.randn(1, MAX_LENGTH, HIDDEN_SIZE)
    request = Backward(tiny_checkpoint.model_id, SPAN, encode_tensor(states), encode_tensor(states))
    with pytest.raises(BadRequest, match=r"rows of up to (\d+) tokens fit") as refused:
        await service.backward(TRAINER, request)
    fitting = int(str(refused.value).rpartition("up to ")[2].split()[0])
    shorter = encode_tensor(states[:, :fitting].contiguous())
    reply = await service.backward(TRAINER, replace(request, hidden_states=shorter, grad_outputs=shorter))
    assert reply.grad_inputs.shape == (1, fitting, HIDDEN_SIZE)


async def test_a_session_computes_with_its_tuning_and_the_one_beside_it_without(
    autojump_clock: MockClock, world: SpanWorld
) -> None:
    hidden_states = torch.randn(1, 10, HIDDEN_SIZE)
    tuning = tuning_of(SPAN)
    fitted = world.model.fit_tuning(tuning)
    plain, changed = world.model.new_cache(1), world.model.new_cache(1)
    async with (
        world.client() as client,
        world.session(client, tuning=wired(tuning)) as tuned_session,
        world.session(client) as session,
    ):
        for start, end in ((0, 3), (3, 4), (4, 9), (9, 10)):
            new = hidden_states[:, start:end].contiguous()
            expected = world.model.run(new, changed, position=start, tuning=fitted)
            torch.testing.assert_close(await run_step(tuned_session, new, start), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(await run_step(session, new, start), world.model.run(new, plain, position=start))
    await trio.sleep(1)
    assert (world.service.tunings.num_held, world.service.tunings.used_bytes) == (0, 0)


async def test_tunings_of_all_sessions_together_are_bounded_and_come_back(
    autojump_clock: MockClock, world: SpanWorld
) -> None:
    tuning = wired(tuning_of(SPAN, rank=6))
    assert MAX_TUNING_BYTES / 2 < tuning.num_bytes <= MAX_TUNING_BYTES
    states = torch.randn(1, 3, HIDDEN_SIZE)
    async with world.client() as client, world.client(3) as other:
        most = 4 * MAX_TUNING_BYTES // tuning.num_bytes
        async with trio.open_nursery() as nursery:
            num_opened = 0

            async def hold() -> None:
                nonlocal num_opened
                async with world.session(client, tuning=tuning) as session:
                    await run_step(session, states, 0)
                    num_opened += 1
                    await trio.sleep_forever()

            for _ in range(most):
                nursery.start_soon(hold)
            await trio.sleep(1)
            assert num_opened == most
            assert world.service.tunings.used_bytes == most * tuning.num_bytes
            for call in (other.backward, other.forward):
                kind = Backward if call == other.backward else Forward
                gradients = (encode_tensor(states),) if kind is Backward else ()
                request: Any = kind(world.model_id, SPAN, encode_tensor(states), *gradients, tuning=tuning)
                with pytest.raises(ServerBusy, match="no room for a tuning of"):
                    await call(world.server.peer_id, request, TIMEOUT_S)
            await world.backward(other, world.backward_request(states, states))
            nursery.cancel_scope.cancel()
        await trio.sleep(1)
        assert world.service.tunings.used_bytes == 0
        reply = await world.backward(other, world.backward_request(states, states, tuning=tuning))
        assert reply.grad_tuning is not None


async def test_the_tuning_of_a_client_that_hangs_is_not_kept_for_ever(
    autojump_clock: MockClock, world: SpanWorld
) -> None:
    async with world.client() as client, world.session(client, tuning=wired(tuning_of(SPAN))) as session:
        await run_step(session, torch.randn(1, 2, HIDDEN_SIZE), 0)
        async with world.session(client) as plain:
            await run_step(plain, torch.randn(1, 2, HIDDEN_SIZE), 0)
            assert world.service.tunings.num_held == 1
        (client_peer,) = world.server.connected_peers
        world.memory.hang(client_peer)
        await trio.sleep(60)
        assert world.service.tunings.num_held == 0
        world.memory.resume(client_peer)


async def test_a_step_that_a_tuning_makes_infinite_is_refused(autojump_clock: MockClock, world: SpanWorld) -> None:
    low_rank = LowRank(torch.full((1, 128), 1e30), torch.full((64, 1), 1e30))
    tuning = wired(SpanTuning(SPAN, None, {5: {"mlp.down_proj": low_rank}}))
    states = torch.randn(1, 2, HIDDEN_SIZE)
    async with world.client() as client:
        forward = Forward(world.model_id, SPAN, encode_tensor(states), tuning=tuning)
        with pytest.raises(RequestRefused, match="or the tuning, is too large"):
            await client.forward(world.server.peer_id, forward, TIMEOUT_S)
        async with world.session(client, tuning=tuning) as session, world.session(client) as plain:
            with pytest.raises(RequestRefused, match="or the tuning, is too large"):
                await run_step(session, states, 0)
            expected = world.model.run(states, None, position=0)
            torch.testing.assert_close(await run_step(plain, states, 0), expected, rtol=1e-5, atol=1e-5)


async def test_a_session_is_exact_between_the_parts_of_a_tuned_pass(
    autojump_clock: MockClock, world: SpanWorld
) -> None:
    world.service.dispatcher.costs.tokens_within = lambda kind, time_s: 1  # type: ignore[method-assign]
    hidden_states = torch.randn(1, 32, HIDDEN_SIZE)
    states, gradients = torch.randn(2, 6, 8, HIDDEN_SIZE)
    tuning = tuning_of(SPAN)
    cache = world.model.new_cache(1)
    replies: list[BackwardReply] = []

    async def train() -> None:
        request = world.backward_request(states, gradients, tuning=wired(tuning))
        replies.append(await world.service.backward(TRAINER, request))

    opening = OpenSession(SessionId("reader"), world.model_id, SPAN, max_length=32, batch_size=1)
    session = await world.service.open_session(PeerId("reader"), opening)
    num_between = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(train)
        for position in range(32):
            new = hidden_states[:, position : position + 1].contiguous()
            reply = await session.step(Step(position, position, encode_tensor(new)))
            expected = world.model.run(new, cache, position=position)
            assert torch.equal(decode_tensor(reply.hidden_states), expected)
            num_parts = world.service.dispatcher.statistics().num_parts.get(Kind.BACKWARD, 0)
            num_between += not replies and num_parts > 0
    await session.close()
    assert num_between >= 5
    expected_gradients = world.model.run_backward(states, gradients, tuning=world.model.fit_tuning(tuning))
    (gradient_reply,) = replies
    torch.testing.assert_close(
        decode_tensor(gradient_reply.grad_inputs), expected_gradients.inputs, rtol=1e-4, atol=1e-4
    )


@pytest.mark.own_process
async def test_memory_is_what_it_was_after_two_hundred_calls(autojump_clock: MockClock, world: SpanWorld) -> None:
    process = psutil.Process()
    rss_bytes = []
    dice = random.Random(3)
    async with world.client() as client:
        for number in range(240):
            rows, tokens = dice.randint(1, 4), dice.randint(1, 16)
            states, gradients = torch.randn(2, rows, tokens, HIDDEN_SIZE)
            tuning = wired(tuning_of(SPAN, seed=number)) if number % 2 else None
            codec = dice.choice([Codec.NONE, Codec.BLOCKWISE_INT8])
            await world.backward(client, world.backward_request(states, gradients, tuning=tuning, codec=codec))
            if number in (39, 239):
                gc.collect()
                rss_bytes.append(process.memory_info().rss)
    assert world.service.dispatcher.statistics().num_tokens[Kind.BACKWARD] > 240
    assert rss_bytes[1] - rss_bytes[0] < 8 * MIB
    assert (world.service.tunings.num_held, world.service.memory.tokens_left) == (0, CACHE_TOKENS)


def test_the_layers_of_these_tunings_are_those_of_the_model(tiny_span: SpanModel) -> None:
    assert LAYERS.keys() <= dict(tiny_span._blocks[3].named_modules()).keys()
