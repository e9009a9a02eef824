"""Steps in any order, good and bad: a session answers as the model does over the tokens that were accepted."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pswarm.blocks.pages import PAGE_TOKENS
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.core.errors import BadRequest
from p2pswarm.core.ids import PeerId, SessionId
from p2pswarm.core.span import Span
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import OpenSession, Step
from swarmd.device_thread import InlineDevice
from swarmd.handler import Served, SpanService

HIDDEN_SIZE = 64
BATCH_SIZE = 3
MAX_LENGTH = 12
NUM_PAGES = 16


@dataclass(frozen=True)
class Attempt:
    """A step as hypothesis draws it; what does not fit the session must be refused."""

    rollback: int
    num_tokens: int
    has_mask: bool
    has_position_ids: bool
    beam_indices: tuple[int, ...] | None
    spoil: str | None
    seed: int


attempts = st.builds(
    Attempt,
    rollback=st.integers(-1, 4),
    num_tokens=st.integers(0, 5),
    has_mask=st.booleans(),
    has_position_ids=st.booleans(),
    beam_indices=st.none() | st.tuples(*[st.integers(0, BATCH_SIZE - 1)] * BATCH_SIZE),
    spoil=st.none() | st.none() | st.sampled_from(["nan", "size", "batch", "beam", "position_ids"]),
    seed=st.integers(0, 1 << 16),
)


class History:
    """The tokens that count so far, and what the model makes of them from scratch."""

    def __init__(self) -> None:
        self.hidden_states = torch.zeros(BATCH_SIZE, 0, HIDDEN_SIZE)
        self.mask = torch.zeros(BATCH_SIZE, 0, dtype=torch.bool)
        self.position_ids = torch.zeros(BATCH_SIZE, 0, dtype=torch.int64)

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def accept(self, position: int, new: "NewTokens", beam_indices: tuple[int, ...] | None) -> None:
        rows = torch.tensor(beam_indices if beam_indices is not None else range(BATCH_SIZE))
        for name in ("hidden_states", "mask", "position_ids"):
            kept = getattr(self, name)[rows, :position]
            setattr(self, name, torch.cat([kept, getattr(new, name)], dim=1))

    def answer(self, model: SpanModel) -> torch.Tensor:
        return model.run(self.hidden_states, None, position=0, attention_mask=self.mask, position_ids=self.position_ids)


@dataclass(frozen=True)
class NewTokens:
    hidden_states: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor


def draw_tokens(attempt: Attempt, position: int) -> NewTokens:
    torch.manual_seed(attempt.seed)
    shape = BATCH_SIZE, attempt.num_tokens
    mask = torch.rand(shape) > 0.3 if attempt.has_mask else torch.ones(shape, dtype=torch.bool)
    if attempt.num_tokens:
        mask[:, -1] = True  # a row of nothing but padding has no meaning to compare
    position_ids = torch.arange(position, position + attempt.num_tokens).expand(shape)
    if attempt.has_position_ids:
        position_ids = torch.randint(0, MAX_LENGTH, shape)
    return NewTokens(torch.randn(*shape, HIDDEN_SIZE), mask, position_ids)


def make_step(attempt: Attempt, position: int, new: NewTokens) -> Step:
    """The step, spoilt where the attempt says so."""
    hidden_states, position_ids, beam_indices = new.hidden_states.clone(), new.position_ids, attempt.beam_indices
    mask = new.mask
    match attempt.spoil:
        case "nan" if attempt.num_tokens:
            hidden_states[1, -1, 5] = float("nan")
        case "size":
            hidden_states = torch.randn(BATCH_SIZE, attempt.num_tokens, HIDDEN_SIZE // 2)
        case "batch":
            hidden_states, mask, position_ids = hidden_states[:1], mask[:1], position_ids[:1]
            beam_indices = beam_indices[:1] if beam_indices is not None else None
        case "beam":
            beam_indices = (0, BATCH_SIZE, 0)
        case "position_ids" if attempt.num_tokens:
            position_ids = position_ids + MAX_LENGTH * 10
    return Step(
        step_id=0,
        position=position,
        hidden_states=encode_tensor(hidden_states),
        attention_mask=encode_tensor(mask) if attempt.has_mask else None,
        position_ids=encode_tensor(position_ids)
        if attempt.has_position_ids or attempt.spoil == "position_ids"
        else None,
        beam_indices=encode_tensor(torch.tensor(beam_indices)) if beam_indices is not None else None,
    )


def must_be_refused(attempt: Attempt, position: int, length: int) -> bool:
    if position > length or position + attempt.num_tokens > MAX_LENGTH:
        return True
    if attempt.spoil in ("nan", "position_ids"):
        return attempt.num_tokens > 0
    return attempt.spoil is not None


async def check_session(model: SpanModel, checkpoint: Checkpoint, tried: list[Attempt]) -> None:
    served = Served(checkpoint.model_id, model, model.new_pool(NUM_PAGES), MAX_LENGTH * 2)
    service = SpanService(served, InlineDevice(), lambda: pytest.fail("nobody asks for info"))
    request = OpenSession(SessionId("s"), checkpoint.model_id, Span(2, 6), MAX_LENGTH, BATCH_SIZE)
    session = await service.open_session(PeerId("stranger"), request)
    history = History()
    for attempt in tried:
        position = max(history.length - attempt.rollback, 0)
        new = draw_tokens(attempt, position)
        step = make_step(attempt, position, new)
        if must_be_refused(attempt, position, history.length):
            with pytest.raises(BadRequest):
                await session.step(step)
            continue
        reply = await session.step(step)
        history.accept(position, new, attempt.beam_indices)
        assert reply.position == history.length
        if attempt.num_tokens:
            expected = history.answer(model)[:, -attempt.num_tokens :]
            got = decode_tensor(reply.hidden_states)
            torch.testing.assert_close(got[new.mask], expected[new.mask], rtol=1e-4, atol=1e-4)
    await session.close()
    await trio.testing.wait_all_tasks_blocked()
    assert service.memory.tokens_left == NUM_PAGES * PAGE_TOKENS


@given(tried=st.lists(attempts, min_size=1, max_size=8))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_those_of_the_accepted_tokens(
    tiny_span: SpanModel, tiny_checkpoint: Checkpoint, tried: list[Attempt]
) -> None:
    trio.run(partial(check_session, tiny_span, tiny_checkpoint, tried))
