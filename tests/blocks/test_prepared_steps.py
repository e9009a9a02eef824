"""A token whose surroundings were computed before it came gives the bits that any other would."""

from pathlib import Path
from typing import Any

import pytest
import torch

from p2pswarm.blocks.span_block import SpanBlock
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

HIDDEN = 64
PROMPT_TOKENS, STEPS = 12, 8
"""Past a sliding window of 8 tokens."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def span_of(folder: Path, model_type: str) -> SpanModel:
    return load_span(open_checkpoint(str(save_tiny_checkpoint(folder, model_type))), Span(1, 5))


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    return span_of(tmp_path_factory.mktemp("gemma2"), "gemma2")


@pytest.fixture
def count_decoder_calls(span: SpanModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    run_decoder = span._run_decoder

    def counting(states: torch.Tensor, *arguments: Any) -> torch.Tensor:
        calls.append(states.shape[1])
        return run_decoder(states, *arguments)

    monkeypatch.setattr(span, "_run_decoder", counting)
    return calls


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "qwen3_moe", "gpt2", "bloom", "deepseek_v3"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_prepared_tokens_come_out_bit_for_bit(model_type: str, batch_size: int, tmp_path: Path) -> None:
    span = span_of(tmp_path, model_type)
    hidden_states = torch.randn(batch_size, PROMPT_TOKENS + STEPS, HIDDEN)
    plain_cache, cache = span.new_cache(batch_size), span.new_cache(batch_size)
    for each in (plain_cache, cache):
        span.run(hidden_states[:, :PROMPT_TOKENS], each, position=0)
    for position in range(PROMPT_TOKENS, PROMPT_TOKENS + STEPS):
        prepared = span.prepare(cache)
        assert prepared is not None
        token = hidden_states[:, position : position + 1]
        expected = span.run(token, plain_cache, position=position)
        assert torch.equal(span.run(token, cache, position=position, prepared=prepared), expected)


def test_a_prepared_token_does_not_run_the_decoder_again(span: SpanModel, count_decoder_calls: list[int]) -> None:
    cache = span.new_cache(1)
    span.run(torch.randn(1, 3, HIDDEN), cache, position=0)
    prepared = span.prepare(cache)
    span.run(torch.randn(1, 1, HIDDEN), cache, position=3, prepared=prepared)
    assert count_decoder_calls == [3]
    assert cache.length == 4


@pytest.mark.parametrize(("position", "num_tokens"), [(2, 1), (3, 2)])
def test_what_was_prepared_for_another_step_is_not_used(
    span: SpanModel, count_decoder_calls: list[int], position: int, num_tokens: int
) -> None:
    cache = span.new_cache(1)
    span.run(torch.randn(1, 3, HIDDEN), cache, position=0)
    prepared = span.prepare(cache)
    span.run(torch.randn(1, num_tokens, HIDDEN), cache, position=position, prepared=prepared)
    assert count_decoder_calls == [3, num_tokens]


def test_nothing_prepared_is_used_with_padding(span: SpanModel, count_decoder_calls: list[int]) -> None:
    cache = span.new_cache(1)
    span.run(torch.randn(1, 3, HIDDEN), cache, position=0)
    mask = torch.tensor([[False, True, True, True]])
    span.run(torch.randn(1, 1, HIDDEN), cache, position=3, prepared=span.prepare(cache), attention_mask=mask)
    assert count_decoder_calls == [3, 1]


def test_a_part_of_a_span_and_reordered_beams_can_be_prepared(span: SpanModel, count_decoder_calls: list[int]) -> None:
    blocks, beams = Span(2, 4), torch.tensor([1, 1, 0])
    hidden_states = torch.randn(3, 6, HIDDEN)
    plain_cache, cache = span.new_cache(3, blocks), span.new_cache(3, blocks)
    for each in (plain_cache, cache):
        span.run(hidden_states[:, :5], each, position=0, blocks=blocks)
    prepared = span.prepare(cache, blocks)
    for each in (plain_cache, cache):
        each.reorder(beams)
    token = hidden_states[:, 5:]
    got = span.run(token, cache, position=5, blocks=blocks, prepared=prepared)
    assert count_decoder_calls == [5, 5]
    assert torch.equal(got, span.run(token, plain_cache, position=5, blocks=blocks))


def test_a_failed_prepared_token_is_forgotten(span: SpanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = span.new_cache(1)
    span.run(torch.randn(1, 3, HIDDEN), cache, position=0)
    prepared = span.prepare(cache)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(span._blocks, 3, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        span.run(torch.randn(1, 1, HIDDEN), cache, position=3, prepared=prepared)
    assert cache.length == 3


def test_a_model_that_does_more_between_its_blocks_is_not_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SpanBlock.forward

    def forward_and_double(block: SpanBlock, *arguments: Any, **named: Any) -> Any:
        output = forward(block, *arguments, **named)
        return output * 2 if block.index == 2 else output

    monkeypatch.setattr(SpanBlock, "forward", forward_and_double)
    span = span_of(tmp_path, "llama")
    assert span.prepare(span.new_cache(1)) is None
