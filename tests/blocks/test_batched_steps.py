"""Sessions of different lengths that decode together get what each would get alone."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pswarm.blocks.client_model import BlocksCall, SwarmCache, load_client_model
from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.blocks.kv_pool import KVPool
from p2pswarm.blocks.pages import PAGE_TOKENS, OutOfPages
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.blocks.span_steps import BatchedStep
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import OPTIONS, save_tiny_checkpoint

HIDDEN = 64
TOLERANCE = 5e-5
ONE_BY_ONE = {"bloom", "falcon", "deepseek_v3"}
"""ALiBi by a bias of the model's own; an attention of its own; keys that are unpacked after they are remembered."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    """Half of its layers see only 8 tokens back."""
    torch.set_num_threads(1)
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("gemma2"), "gemma2")
    return load_span(open_checkpoint(str(folder)), Span(1, 5))


def session(span: SpanModel, pool: KVPool, length: int, num_rows: int = 1, max_length: int = 64) -> SpanCache:
    cache = span.new_cache(num_rows, max_length=max_length, pool=pool)
    if length:
        span.run(torch.randn(num_rows, length, HIDDEN), cache, position=0)
    return cache


def next_steps(caches: Sequence[SpanCache]) -> list[BatchedStep]:
    return [BatchedStep(cache, torch.randn(cache.num_sequences, 1, HIDDEN), cache.length) for cache in caches]


def apart(span: SpanModel, steps: Sequence[BatchedStep]) -> list[torch.Tensor]:
    """The answers to the steps, one at a time; afterwards the sessions are where they were."""
    answers = []
    for step in steps:
        answers.append(span.run(step.hidden_states, step.cache, position=step.position))
        step.cache.crop(step.position)
    return answers


def assert_same(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("model_type", OPTIONS)
def test_whatever_an_architecture_does_a_batch_is_its_sessions(model_type: str, tmp_path: Path) -> None:
    span = load_span(open_checkpoint(str(save_tiny_checkpoint(tmp_path, model_type))), Span(1, 5))
    assert span.can_batch == (model_type not in ONE_BY_ONE)
    if not span.can_batch:
        return
    pool = span.new_pool(12)
    caches = [session(span, pool, length, num_rows) for length, num_rows in ((7, 1), (31, 1), (12, 3), (40, 1))]
    for _ in range(10):
        steps = next_steps(caches)
        expected = apart(span, steps)
        assert_same(span.run_batch(steps), expected)
    assert [cache.length for cache in caches] == [17, 41, 22, 50]


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=8), expected=st.integers(1, 300), data=st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_may_lie_in_pieces_and_be_rolled_back(
    span: SpanModel, lengths: list[int], expected: int, data: st.DataObject
) -> None:
    pool = span.new_pool(24)
    caches = [session(span, pool, length, max_length=expected) for length in lengths]
    for _ in range(3):
        for cache in caches:
            cache.crop(data.draw(st.integers(0, cache.length)))
            try:
                num_tokens = data.draw(st.integers(1, 40))
                span.run(torch.randn(1, num_tokens, HIDDEN), cache, position=cache.length)
            except OutOfPages:
                cache.make_room(cache.length, 0)
        for cache in caches[1:]:
            if pool.pages.num_free < len(caches):
                cache.make_room(0, 0)
        steps = next_steps(caches)
        answers = apart(span, steps)
        assert_same(span.run_batch(steps), answers)


def test_a_row_in_pieces_attends_to_all_of_them(span: SpanModel) -> None:
    pool = span.new_pool(3)
    caches = [session(span, pool, 20, max_length=PAGE_TOKENS) for _ in range(2)]
    for start in (20, 27):
        span.run(torch.randn(1, 7, HIDDEN), caches[0], position=start)
    assert caches[0].placement.first_slots == (None,)

    steps = next_steps(caches)
    expected = apart(span, steps)
    assert_same(span.run_batch(steps), expected)


def test_beams_that_share_pages_can_be_part_of_a_batch(span: SpanModel) -> None:
    pool = span.new_pool(20)
    beams, other = session(span, pool, 40, num_rows=3), session(span, pool, 5)
    steps = next_steps([beams, other])

    beams.make_room(40, 1, [2, 2, 0])
    answers = apart(span, steps)
    assert_same(span.run_batch(steps), answers)

    assert beams.num_pages == 2 + 3


def test_a_batch_that_fails_leaves_every_session_as_it_was(span: SpanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = span.new_pool(8)
    caches = [session(span, pool, 20), session(span, pool, 9)]
    steps = next_steps(caches)
    expected = apart(span, steps)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(span._blocks[3], "forward", fail)
        broken.setattr(type(span._blocks[3]), "__call__", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            span.run_batch(steps)

    assert [cache.length for cache in caches] == [20, 9]
    assert span._config._attn_implementation == "eager"
    assert_same(apart(span, steps), expected)
    assert_same(span.run_batch(steps), expected)


def test_a_batch_goes_through_one_part_of_a_span(span: SpanModel) -> None:
    pool, part = span.new_pool(8), Span(2, 4)
    caches = [span.new_cache(1, part, pool=pool) for _ in range(2)]
    for cache, length in zip(caches, (20, 3), strict=True):
        span.run(torch.randn(1, length, HIDDEN), cache, position=0, blocks=part)
    steps = next_steps(caches)
    expected = [span.run(step.hidden_states, step.cache, position=step.position, blocks=part).clone() for step in steps]

    assert_same(span.run_batch(steps), expected)
    with pytest.raises(ValueError, match="one span and one pool, not 2:4 and 1:5"):
        span.run_batch([*steps, *next_steps([session(span, pool, 2)])])


def test_a_step_of_two_tokens_is_no_part_of_a_batch(span: SpanModel) -> None:
    cache = session(span, span.new_pool(2), 3)
    with pytest.raises(ValueError, match=r"has the shape \[1, 1, 64\], not \[1, 2, 64\]"):
        span.run_batch([BatchedStep(cache, torch.randn(1, 2, HIDDEN), 3)])


def test_without_a_page_nobody_s_step_is_taken(span: SpanModel) -> None:
    pool = span.new_pool(2)
    caches = [session(span, pool, 4), session(span, pool, PAGE_TOKENS)]
    with pytest.raises(OutOfPages):
        span.run_batch(next_steps(caches))
    assert [cache.length for cache in caches] == [4, PAGE_TOKENS]


class Rendezvous:
    """Runs the blocks for several generations at a time, in threads of their own: single tokens only all together."""

    def __init__(self, spans: Sequence[SpanModel], num_sessions: int) -> None:
        self._spans = spans
        self._pools = [span.new_pool(4 * num_sessions) for span in spans]
        self._prefill = threading.Lock()
        self._all_here = threading.Barrier(num_sessions, action=self._run_all)
        self._steps: list[BatchedStep] = []
        self._answers: dict[SpanCache, torch.Tensor] = {}
        self.num_batches = 0

    def member(self) -> "Member":
        pairs = zip(self._spans, self._pools, strict=True)
        return Member(self, [span.new_cache(1, pool=pool) for span, pool in pairs])

    def prefill(self, states: torch.Tensor, caches: Sequence[SpanCache]) -> torch.Tensor:
        with self._prefill:
            for span, cache in zip(self._spans, caches, strict=True):
                states = span.run(states, cache, position=0)
        return states

    def decode(self, states: torch.Tensor, caches: Sequence[SpanCache]) -> torch.Tensor:
        for cache in caches:
            self._steps.append(BatchedStep(cache, states, cache.length))
            self._all_here.wait()
            states = self._answers[cache]
            self._all_here.wait()
        return states

    def _run_all(self) -> None:
        if self._steps:
            steps, self._steps = self._steps, []
            (span,) = (each for each in self._spans if each.span == steps[0].cache.span)
            answers = span.run_batch(steps)
            self._answers = {step.cache: answer for step, answer in zip(steps, answers, strict=True)}
            self.num_batches += 1


class Member:
    def __init__(self, rendezvous: Rendezvous, caches: Sequence[SpanCache]) -> None:
        self._rendezvous = rendezvous
        self._caches = caches

    def __call__(self, call: BlocksCall) -> torch.Tensor:
        if call.position == 0:
            return self._rendezvous.prefill(call.hidden_states, self._caches)
        return self._rendezvous.decode(call.hidden_states, self._caches)


def generated(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    tokens: torch.Tensor = model.generate(
        prompt, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, **options
    )
    return tokens


def generated_together(checkpoint: Checkpoint, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    rendezvous = Rendezvous([load_span(checkpoint, Span(0, 3)), load_span(checkpoint, Span(3, 8))], len(prompts))
    models = [load_client_model(checkpoint, rendezvous.member()) for _ in prompts]
    tokens = [torch.empty(0)] * len(prompts)

    def generate(index: int) -> None:
        tokens[index] = generated(models[index], prompts[index], past_key_values=SwarmCache())

    threads = [threading.Thread(target=generate, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rendezvous.num_batches == 2 * 19
    return tokens


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe", "gpt_oss", "gpt2"])
def test_greedy_tokens_of_sessions_together_are_the_local_model_s(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, model_type)))
    local = load_local_model(checkpoint)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 128, (1, length), generator=generator) for length in (24, 5, 13, 30)]

    together = generated_together(checkpoint, prompts)

    for prompt, tokens in zip(prompts, together, strict=True):
        assert torch.equal(tokens, generated(local, prompt))
