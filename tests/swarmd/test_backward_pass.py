"""Gradients through a served span: those of autograd, in parts of any size, with what clients bring along."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import trio
from tiny_tunings import tuning_of, wired
from trio.testing import MockClock

from p2pswarm.blocks.pages import PAGE_TOKENS
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.core.ids import PeerId
from p2pswarm.core.span import Span
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import Backward, Codec, Forward
from p2pswarm.wire.tuning import WireTuning
from swarmd.device_thread import InlineDevice
from swarmd.handler import Served, SpanService
from swarmd.scheduling.work import Kind
from swarmd.training_memory import TripSize

SPAN = Span(2, 6)
HIDDEN_SIZE = 64
MAX_LENGTH = 64
CACHE_TOKENS = 8 * PAGE_TOKENS
CLIENT = PeerId("trainer")


@dataclass
class World:
    service: SpanService
    model: SpanModel
    checkpoint: Checkpoint

    def request(self, states: torch.Tensor, gradients: torch.Tensor, **more: Any) -> Backward:
        written = {
            name: encode_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in more.items()
        }
        return Backward(self.checkpoint.model_id, SPAN, encode_tensor(states), encode_tensor(gradients), **written)


def open_world(checkpoint: Checkpoint, model: SpanModel, **more: Any) -> World:
    pool = model.new_pool(CACHE_TOKENS // PAGE_TOKENS)
    served = Served(checkpoint.model_id, model, pool, MAX_LENGTH, **more)
    return World(SpanService(served, InlineDevice(), lambda: pytest.fail("nobody asks")), model, checkpoint)


@pytest.fixture
async def world(tiny_checkpoint: Checkpoint, tiny_span: SpanModel) -> World:
    return open_world(tiny_checkpoint, tiny_span)


def tensors_of(tuning: WireTuning | None) -> list[torch.Tensor]:
    assert tuning is not None
    return [decode_tensor(tensor) for tensor in tuning.tensors()]


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.dist(got, expected) <= 1e-4 * expected.norm())


@pytest.mark.parametrize(
    ("most_tokens", "max_rows", "num_parts"),
    [(10_000, None, 1), (10_000, 2, 3), (20, None, 4), (3, None, 40), (1, 1, 55)],
)
async def test_gradients_are_those_of_the_whole_batch_however_it_is_cut(
    most_tokens: int, max_rows: int | None, num_parts: int, autojump_clock: MockClock, world: World
) -> None:
    world.service.dispatcher.costs.tokens_within = lambda kind, time_s: most_tokens  # type: ignore[method-assign]
    if max_rows is not None:
        world.service._trip_size = lambda *asked: TripSize(max_rows, 1)  # type: ignore[method-assign]
    states, gradients = torch.randn(2, 5, 8, HIDDEN_SIZE)
    mask = torch.ones(5, 8, dtype=torch.bool)
    mask[3, :2] = False
    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
    tuning = tuning_of(SPAN)
    expected = world.model.run_backward(
        states, gradients, attention_mask=mask, position_ids=position_ids, tuning=world.model.fit_tuning(tuning)
    )
    reply = await world.service.backward(
        CLIENT, world.request(states, gradients, attention_mask=mask, position_ids=position_ids, tuning=wired(tuning))
    )
    assert close(decode_tensor(reply.grad_inputs), expected.inputs)
    assert expected.tuning is not None
    for got, wanted in zip(tensors_of(reply.grad_tuning), tensors_of(wired(expected.tuning)), strict=True):
        assert close(got, wanted)
    statistics = world.service.dispatcher.statistics()
    assert statistics.num_tokens[Kind.BACKWARD] == 40
    assert statistics.num_parts == {Kind.BACKWARD: num_parts}


async def test_blocks_that_are_asked_for_are_gone_through_with_or_without_a_tuning(
    autojump_clock: MockClock, world: World
) -> None:
    states, gradients = torch.randn(2, 2, 6, HIDDEN_SIZE)
    span = Span(3, 5)
    expected = world.model.run_backward(states, gradients, blocks=span)
    reply = await world.service.backward(CLIENT, replace(world.request(states, gradients), span=span))
    assert close(decode_tensor(reply.grad_inputs), expected.inputs)
    assert reply.grad_tuning is None
    tuning = replace(tuning_of(span), prompts=None)
    expected = world.model.run_backward(states, gradients, blocks=span, tuning=world.model.fit_tuning(tuning))
    reply = await world.service.backward(
        CLIENT, replace(world.request(states, gradients, tuning=wired(tuning)), span=span)
    )
    assert close(decode_tensor(reply.grad_inputs), expected.inputs)
    assert expected.tuning is not None
    for got, wanted in zip(tensors_of(reply.grad_tuning), tensors_of(wired(expected.tuning)), strict=True):
        assert close(got, wanted)


@pytest.mark.parametrize(
    ("dtype", "codec", "tolerance"),
    [
        (torch.float32, Codec.BLOCKWISE_INT8, 0.02),
        (torch.float32, Codec.BFLOAT16, 0.005),
        (torch.bfloat16, Codec.NONE, 0.005),
    ],
)
async def test_gradients_come_in_the_dtype_and_codec_of_the_request(
    dtype: torch.dtype, codec: Codec, tolerance: float, autojump_clock: MockClock, world: World
) -> None:
    states, gradients = torch.randn(2, 2, 6, HIDDEN_SIZE).to(dtype)
    expected = world.model.run_backward(states.float(), gradients.float())
    reply = await world.service.backward(CLIENT, world.request(states, gradients, codec=codec))
    got = decode_tensor(reply.grad_inputs)
    assert (got.dtype, reply.grad_inputs.codec) == (dtype, codec)
    assert torch.dist(got.float(), expected.inputs) <= tolerance * expected.inputs.norm()


@pytest.mark.parametrize("most_tokens", [1000, 16, 3])
async def test_a_tuning_changes_forward_passes_in_parts_of_any_size(
    most_tokens: int, autojump_clock: MockClock, world: World
) -> None:
    world.service.dispatcher.costs.tokens_within = lambda kind, time_s: most_tokens  # type: ignore[method-assign]
    states = torch.randn(3, 8, HIDDEN_SIZE)
    tuning = tuning_of(SPAN)
    expected = world.model.run(states, None, position=0, tuning=world.model.fit_tuning(tuning))
    request = Forward(world.checkpoint.model_id, SPAN, encode_tensor(states), tuning=wired(tuning))
    reply = await world.service.forward(CLIENT, request)
    assert close(decode_tensor(reply.hidden_states), expected)
    plain = await world.service.forward(CLIENT, replace(request, tuning=None))
    assert close(decode_tensor(plain.hidden_states), world.model.run(states, None, position=0))
    assert not close(decode_tensor(plain.hidden_states), expected)


async def test_a_backward_pass_that_nobody_waits_for_any_more_leaves_nothing_behind(
    autojump_clock: MockClock, world: World
) -> None:
    world.service.dispatcher.costs.tokens_within = lambda kind, time_s: 1  # type: ignore[method-assign]
    states, gradients = torch.randn(2, 2, 6, HIDDEN_SIZE)
    request = world.request(states, gradients, tuning=wired(tuning_of(SPAN)))
    expected = world.model.run_backward(states, gradients)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.service.backward, CLIENT, request)
        while not world.service.dispatcher.statistics().num_parts.get(Kind.BACKWARD):
            await trio.lowlevel.checkpoint()
        assert world.service.tunings.num_held == 1
        nursery.cancel_scope.cancel()
    assert (world.service.tunings.num_held, world.service.tunings.used_bytes) == (0, 0)
    reply = await world.service.backward(CLIENT, replace(request, tuning=None))
    assert close(decode_tensor(reply.grad_inputs), expected.inputs)
    assert world.service.dispatcher.statistics().num_waiting == 0
