"""A tuning changes the run it is given to, exactly, and no other; what does not fit the span is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tuned_reference import LocalSpan, random_tuning, tensors_of

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.blocks.architecture import lay_out
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

HIDDEN = 64
SPAN = Span(2, 6)
TOKENS, NUM_PROMPTS = 14, 5
"""Past a sliding window of 8 tokens."""
Q_PROJ = "self_attn.q_proj"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(save_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")))


@pytest.fixture(scope="module")
def span(llama: Checkpoint) -> SpanModel:
    return load_span(llama, SPAN)


def local_span(checkpoint: Checkpoint, span: Span = SPAN) -> LocalSpan:
    model = load_local_model(checkpoint)
    return LocalSpan(model, model.get_submodule(lay_out(checkpoint.config, torch.float32).blocks_path), span)


def tuning_of(checkpoint: Checkpoint, span: Span = SPAN, *, seed: int = 0) -> SpanTuning:
    blocks = lay_out(checkpoint.config, torch.float32).blocks
    return random_tuning(blocks, span, hidden_size=HIDDEN, num_prompts=NUM_PROMPTS, seed=seed)


def random_states(batch: int = 1, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(5))


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral", "gpt2", "bloom"])
def test_a_text_that_comes_in_parts_is_tuned_as_a_whole(model_type: str, tmp_path: Path) -> None:
    """Parts end within the prompts and after them, single tokens come prepared and not, and some come twice."""
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, model_type)))
    span, tuning = load_span(checkpoint, SPAN), tuning_of(checkpoint)
    states = random_states(batch=2)
    expected = local_span(checkpoint).run(states, tuning)
    assert float(torch.dist(expected, local_span(checkpoint).run(states))) > 1
    cache = span.new_cache(2)
    for start, end in ((0, 3), (3, 4), (4, 7), (2, 6), (6, 7), (7, 8), (8, 12), (5, 9), (3, 4), (4, TOKENS)):
        prepared = span.prepare(cache) if start == cache.length else None
        part = states[:, start:end]
        assert_same(span.run(part, cache, position=start, prepared=prepared, tuning=tuning), expected[:, start:end])


def test_padded_texts_are_tuned_from_their_first_column_on(llama: Checkpoint, span: SpanModel) -> None:
    tuning, states = tuning_of(llama), random_states(batch=2)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, :4] = False
    expected = local_span(llama).run(states, tuning, attention_mask=mask.long())
    cache = span.new_cache(2)
    for start, end in ((0, 6), (6, 7), (7, TOKENS)):
        got = span.run(
            states[:, start:end], cache, position=start, attention_mask=mask[:, :end], tuning=tuning,
            position_ids=torch.arange(start, end).expand(2, -1),
        )  # fmt: skip
        assert_same(got[0], expected[0, start:end])
        assert_same(got[1, max(4 - start, 0) :], expected[1, max(start, 4) : end])


def test_a_part_of_the_span_takes_a_tuning_of_that_part(llama: Checkpoint, span: SpanModel) -> None:
    part = Span(3, 5)
    tuning, states = tuning_of(llama, part), random_states()
    assert_same(
        span.run(states, None, position=0, blocks=part, tuning=tuning), local_span(llama, part).run(states, tuning)
    )
    with pytest.raises(ValueError, match="a tuning of the blocks 3:5 was given for a run of 2:6"):
        span.run(states, None, position=0, tuning=tuning)


def test_sessions_with_and_without_a_tuning_do_not_touch_one_another(llama: Checkpoint, span: SpanModel) -> None:
    """Each gets the bits that it gets alone, whoever runs before it."""
    tunings = [None, tuning_of(llama, seed=1), tuning_of(llama, seed=2)]
    states = random_states()

    def decoded(turns: list[int]) -> dict[int, list[torch.Tensor]]:
        caches = {turn: span.new_cache(1) for turn in set(turns)}
        answers: dict[int, list[torch.Tensor]] = {turn: [] for turn in set(turns)}
        for turn in turns:
            cache, position = caches[turn], caches[turn].length
            prepared = span.prepare(cache) if position % 2 else None
            token = states[:, position : position + 1]
            answers[turn].append(span.run(token, cache, position=position, prepared=prepared, tuning=tunings[turn]))
        return answers

    together = decoded([0, 1, 2, 1, 0, 2, 2, 0, 1] * 4)
    for turn in range(3):
        alone = decoded([turn] * 12)[turn]
        assert all(map(torch.equal, together[turn], alone))


def test_a_run_that_fails_takes_its_tuning_with_it(
    llama: Checkpoint, span: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning, states = tuning_of(llama), random_states()
    classes = [type(module) for module in span._decoder.modules()]
    plain = span.run(states, None, position=0)
    cache = span.new_cache(1)
    expected = span.run(states[:, :8], cache, position=0, tuning=tuning)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("out of memory")

    for position in (8, 2):
        with monkeypatch.context() as patch:
            patch.setattr(type(span._blocks[4].mlp), "__call__", fail)
            with pytest.raises(MemoryError):
                span.run(states[:, position:], cache, position=position, tuning=tuning)
        assert cache.length == position
    assert [type(module) for module in span._decoder.modules()] == classes
    assert torch.equal(span.run(states, None, position=0), plain)
    assert_same(span.run(states[:, 2:8], cache, position=2, tuning=tuning), expected[:, 2:])


@pytest.mark.parametrize("kind", [Quantization.INT8, Quantization.NF4])
def test_quantized_layers_are_tuned_too(llama: Checkpoint, kind: Quantization) -> None:
    """A block's answer differs from the one without by what the tuning adds, not by more."""
    block = Span(2, 3)
    tuning, states = tuning_of(llama, block), random_states()
    exact, quantized = (load_span(llama, block, quantization=each) for each in (Quantization.NONE, kind))

    def added(model: SpanModel) -> torch.Tensor:
        return model.run(states, None, position=0, tuning=model.fit_tuning(tuning)) - model.run(
            states, None, position=0
        )

    assert torch.dist(added(quantized), added(exact)) < 0.35 * added(exact).norm()


def test_a_fitted_tuning_is_in_float32_and_knows_its_size(span: SpanModel) -> None:
    sent = SpanTuning(
        SPAN,
        torch.ones(4, 2, HIDDEN, dtype=torch.bfloat16),
        {3: {Q_PROJ: LowRank(torch.ones(2, HIDDEN, dtype=torch.float16), torch.ones(HIDDEN, 2))}},
    )
    fitted = span.fit_tuning(sent)
    assert {tensor.dtype for tensor in tensors_of(fitted)} == {torch.float32}
    assert fitted.num_bytes == 4 * (4 * 2 * HIDDEN + 2 * 2 * HIDDEN)
    assert span.fit_tuning(SpanTuning(Span(3, 4))).num_bytes == 0


def pair(down: tuple[int, ...] = (2, HIDDEN), up: tuple[int, ...] = (HIDDEN, 2)) -> LowRank:
    return LowRank(torch.zeros(down), torch.zeros(up))


def tuned(path: str, low_rank: LowRank, block: int = 3) -> SpanTuning:
    return SpanTuning(SPAN, layers={block: {path: low_rank}})


@pytest.mark.parametrize(
    ("tuning", "complaint"),
    [
        (SpanTuning(Span(1, 4)), "the tuning is for the blocks 1:4, block 1 is not served here"),
        (tuned(Q_PROJ, pair(), block=6), "the tuning changes self_attn.q_proj of block 6, but is for the blocks 2:6"),
        (
            tuned("self_attn.query", pair()),
            "the tuning changes self_attn.query of block 3, which has no such layer, but self_attn.q_proj, self_attn.k",
        ),
        (tuned("self_attn.q_proj.weight", pair()), "of block 3, which has no such layer"),
        (tuned("__class__.forward", pair()), "of block 3, which has no such layer"),
        (
            tuned("self_attn", pair()),
            "self_attn of block 3, a LlamaAttention; only linear layers can be tuned: self_attn.q",
        ),
        (tuned("input_layernorm", pair()), "a LlamaRMSNorm; only linear layers"),
        (tuned("", pair()), "a LlamaDecoderLayer; only linear layers"),
        (
            tuned(Q_PROJ, pair(down=(2, 65))),
            r"self_attn.q_proj of block 3 has the shapes \[2, 65\] and \[64, 2\], wanted \[rank, 64\] and \[64, rank\]",
        ),
        (tuned("mlp.up_proj", pair()), r"wanted \[rank, 64\] and \[128, rank\]"),
        (tuned(Q_PROJ, pair(down=(HIDDEN,))), r"has the shapes \[64\] and \[64, 2\], wanted \[rank, 64\]"),
        (
            tuned(Q_PROJ, pair(up=(HIDDEN, 3))),
            "has the rank 2 in its first matrix and 3 in its second, wanted one",
        ),
        (tuned(Q_PROJ, pair((0, HIDDEN), (HIDDEN, 0))), "wanted one rank of at least 1"),
        (
            tuned(Q_PROJ, LowRank(torch.zeros(2, HIDDEN), torch.full((HIDDEN, 2), float("nan")))),
            "the tuning has values that are not finite for the second matrix of self_attn.q_proj of block 3",
        ),
        (
            tuned(Q_PROJ, LowRank(torch.full((2, HIDDEN), 1e60, dtype=torch.float64), torch.zeros(HIDDEN, 2))),
            "values that are not finite for the first matrix",
        ),
        (
            tuned(Q_PROJ, LowRank(torch.zeros(2, HIDDEN, dtype=torch.int64), torch.zeros(HIDDEN, 2))),
            "the tuning has torch.int64 for the first matrix of self_attn.q_proj of block 3, wanted floats",
        ),
        (
            SpanTuning(SPAN, torch.zeros(3, 2, HIDDEN)),
            r"prompts of the tuning have the shape \[3, 2, 64\], wanted \[4, prompt tokens, 64\] for the blocks 2:6",
        ),
        (SpanTuning(SPAN, torch.zeros(4, 2, 32)), r"have the shape \[4, 2, 32\]"),
        (SpanTuning(SPAN, torch.zeros(4, 0, HIDDEN)), r"have the shape \[4, 0, 64\]"),
        (SpanTuning(SPAN, torch.zeros(4, HIDDEN)), r"have the shape \[4, 64\]"),
        (SpanTuning(SPAN, torch.full((4, 1, HIDDEN), float("inf"))), "not finite for the prompts"),
    ],
)
def test_a_tuning_that_does_not_fit_is_refused(span: SpanModel, tuning: SpanTuning, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        span.fit_tuning(tuning)


def test_a_conv1d_s_sizes_are_told_the_right_way_round(tmp_path: Path) -> None:
    span = load_span(open_checkpoint(str(save_tiny_checkpoint(tmp_path, "gpt2"))), Span(0, 1))
    path = "mlp.c_proj"
    with pytest.raises(ConfigError, match=r"wanted \[rank, 256\] and \[64, rank\]"):
        span.fit_tuning(SpanTuning(Span(0, 1), layers={0: {path: pair((2, 64), (256, 2))}}))
    span.fit_tuning(SpanTuning(Span(0, 1), layers={0: {path: pair((2, 256), (64, 2))}}))


def test_experts_in_one_tensor_cannot_be_tuned(tmp_path: Path) -> None:
    span = load_span(open_checkpoint(str(save_tiny_checkpoint(tmp_path, "mixtral"))), Span(0, 1))
    with pytest.raises(ConfigError, match="a MixtralExperts; only linear layers can be tuned: self"):
        span.fit_tuning(SpanTuning(Span(0, 1), layers={0: {"mlp.experts": pair()}}))


def test_prompts_need_a_model_that_hands_states_from_block_to_block(llama: Checkpoint) -> None:
    span = load_span(llama, Span(0, 1))
    span.can_train = False
    with pytest.raises(ConfigError, match="the tuning has prompts for each block, and none can be added between"):
        span.fit_tuning(SpanTuning(Span(0, 1), torch.zeros(1, 2, HIDDEN)))
    span.fit_tuning(SpanTuning(Span(0, 1), layers={0: {Q_PROJ: pair()}}))
