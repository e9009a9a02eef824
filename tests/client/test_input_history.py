"""What a client keeps for replays is exactly what a server that saw every step would have been sent."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.client.input_history import InputHistory
from p2pswarm.client.step_input import StepInput

HIDDEN_SIZE = 2
MAX_LENGTH = 200
BOUNDARIES = (0, 3, 7)
ROOMY = 1 << 30


def states(seed: int, num_tokens: int, batch_size: int) -> torch.Tensor:
    return torch.randn(batch_size, num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def put_everywhere(history: InputHistory, step: StepInput) -> None:
    for boundary in BOUNDARIES:
        history.put(boundary, step.position, step.hidden_states + boundary)


class Oracle:
    """Whole sequences, built by concatenation."""

    def __init__(self, batch_size: int) -> None:
        self.states = torch.empty(batch_size, 0, HIDDEN_SIZE)
        self.mask = torch.empty(batch_size, 0, dtype=torch.bool)
        self.position_ids = torch.empty(batch_size, 0, dtype=torch.int64)

    def take(self, step: StepInput) -> None:
        rows = torch.arange(len(self.states)) if step.beam_indices is None else step.beam_indices
        counted = torch.arange(step.position, step.end).expand(len(rows), -1)
        mask = torch.ones(len(rows), step.num_tokens, dtype=torch.bool)
        news = (
            step.hidden_states,
            mask if step.attention_mask is None else step.attention_mask,
            counted if step.position_ids is None else step.position_ids,
        )
        olds = (self.states, self.mask, self.position_ids)
        self.states, self.mask, self.position_ids = (
            torch.cat([old[rows, : step.position], new], dim=1) for old, new in zip(olds, news, strict=True)
        )


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 3))
def test_history_follows_steps_rollbacks_beams_masks_and_steps_given_up(data: st.DataObject, batch_size: int) -> None:
    history, oracle = InputHistory(batch_size, MAX_LENGTH, max_bytes=ROOMY), Oracle(batch_size)
    for seed in range(data.draw(st.integers(1, 8))):
        num_tokens = data.draw(st.integers(0, 20))
        position = data.draw(st.integers(0, history.length))
        rows = st.lists(st.integers(0, batch_size - 1), min_size=batch_size, max_size=batch_size)
        beams = data.draw(st.none() | rows) if position else None
        flags = torch.rand(batch_size, num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.5
        step = StepInput(
            states(seed, num_tokens, batch_size),
            position,
            flags if data.draw(st.booleans()) else None,
            flags.long() * 5 if data.draw(st.booleans()) else None,
            None if beams is None else torch.tensor(beams),
        )
        before = history.before(step)
        history.begin(step)
        if data.draw(st.booleans()):
            put_everywhere(history, step)
            history.commit(step.end)
            oracle.take(step)
        else:
            if data.draw(st.booleans()):
                put_everywhere(history, step)
            history.give_up(before)
            oracle.take(StepInput(states(seed, 0, batch_size), position))
        check_replays(history, oracle)


def check_replays(history: InputHistory, oracle: Oracle) -> None:
    assert history.length == oracle.states.shape[1]
    if history.length == 0:
        return
    for boundary in BOUNDARIES:
        replay = history.replay(boundary)
        assert replay.position == 0
        assert torch.equal(replay.hidden_states, oracle.states + boundary)
        mask, position_ids = replay.attention_mask, replay.position_ids
        assert torch.equal(torch.ones_like(oracle.mask) if mask is None else mask, oracle.mask)
        counted = torch.arange(history.length).expand(oracle.position_ids.shape[0], -1)
        assert torch.equal(counted if position_ids is None else position_ids, oracle.position_ids)


def run(history: InputHistory, step: StepInput) -> None:
    history.begin(step)
    put_everywhere(history, step)
    history.commit(step.end)


def test_last_boundaries_are_let_go_of_when_memory_is_short_and_the_first_never_is() -> None:
    bytes_per_boundary = 64 * HIDDEN_SIZE * 4
    history = InputHistory(1, MAX_LENGTH, max_bytes=2 * bytes_per_boundary)
    run(history, StepInput(states(0, 10, 1), 0))
    assert sorted(history.boundaries) == [0, 3]
    run(history, StepInput(states(1, 100, 1), 10))
    assert history.boundaries == [0]
    assert history.replay(0).num_tokens == 110
    assert not history.remembers(3)


def test_boundary_that_was_let_go_of_comes_back_whole_or_not_at_all() -> None:
    history = InputHistory(1, MAX_LENGTH, max_bytes=ROOMY)
    run(history, StepInput(states(0, 10, 1), 0))
    history.forget_all_but({0, 3})
    run(history, StepInput(states(1, 5, 1), 10))
    assert not history.remembers(7)
    history.put(7, 0, states(2, 8, 1))
    assert not history.remembers(7)
    history.put(7, 8, states(3, 7, 1))
    assert history.remembers(7)


def test_memory_grows_with_the_tokens_up_to_the_longest_session() -> None:
    history = InputHistory(2, 100, max_bytes=ROOMY)
    run(history, StepInput(states(0, 65, 2), 0))
    run(history, StepInput(states(0, 35, 2), 65))
    assert history.size_bytes == len(BOUNDARIES) * 2 * 100 * HIDDEN_SIZE * 4


def test_half_precision_halves_the_memory() -> None:
    exact, half = (InputHistory(1, 64, max_bytes=ROOMY, dtype=dtype) for dtype in (None, torch.bfloat16))
    step = StepInput(states(0, 64, 1), 0)
    run(exact, step)
    run(half, step)
    assert half.size_bytes * 2 == exact.size_bytes
    assert torch.equal(half.replay(0).hidden_states, step.hidden_states.bfloat16())
