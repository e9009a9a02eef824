"""Gradients through a span are those of transformers' own model, whatever its weights are stored as, and nothing of
them is left behind.
"""

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_adapters import save_adapter, with_adapter
from torch import nn
from tuned_reference import LocalSpan, random_tuning, tensors_of

from p2pswarm.blocks import quantization as quantization_module
from p2pswarm.blocks.adapters import fit_adapter
from p2pswarm.blocks.architecture import lay_out
from p2pswarm.blocks.packed_weights import JoinedLinear
from p2pswarm.blocks.quantized_linear import KernelLinear, bitsandbytes_linear
from p2pswarm.blocks.span_backward import Gradients, num_stages
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.blocks.span_steps import BatchedStep
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.checkpoint.adapter_files import open_adapter
from p2pswarm.checkpoint.adapter_place import AdapterPlace
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.core.errors import UnsupportedModelError
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import OPTIONS, save_tiny_checkpoint

HIDDEN = 64
SPAN = Span(2, 6)
BATCH, TOKENS = 2, 13
"""Past a sliding window of 8 tokens."""
FLOAT32_ERROR = 1e-4
"""Relative, of each tensor of gradients."""
ROUNDING = 1e-5
"""Likewise: few tokens without gradients go through a kernel of their own."""
BFLOAT16_ERROR = 0.05
"""Likewise, of a tiny random model's; the local model's err by up to 0.034."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(save_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")))


@pytest.fixture(scope="module")
def span(llama: Checkpoint) -> SpanModel:
    return load_span(llama, SPAN)


def local_span(
    checkpoint: Checkpoint, span: Span = SPAN, model: Any = None, dtype: torch.dtype = torch.float32
) -> LocalSpan:
    model = load_local_model(checkpoint, dtype) if model is None else model
    return LocalSpan(model, model.get_submodule(lay_out(checkpoint.config, dtype).blocks_path), span)


def states_and_gradients(batch: int = BATCH, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, batch, tokens, HIDDEN, generator=generator).unbind()


def relative_errors(got: Gradients, expected: Gradients) -> list[float]:
    """Of inputs, prompts, and each matrix."""
    assert got.tuning is not None
    assert expected.tuning is not None
    assert got.tuning.blocks == expected.tuning.blocks
    pairs = zip([got.inputs, *tensors_of(got.tuning)], [expected.inputs, *tensors_of(expected.tuning)], strict=True)
    return [float(torch.dist(one.float(), other.float()) / other.float().norm()) for one, other in pairs]


def paddings(kind: str) -> dict[str, torch.Tensor]:
    hidden = torch.tensor([0, 4])[:, None]
    places = torch.arange(TOKENS)[None]
    mask = places >= hidden if kind == "left" else places < TOKENS - hidden
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("model_type", OPTIONS)
def test_gradients_are_those_of_the_local_model(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, model_type)))
    local, span = local_span(checkpoint), load_span(checkpoint, SPAN)
    tuning = random_tuning(local.blocks, SPAN, hidden_size=HIDDEN)
    states, grads = states_and_gradients()
    torch.testing.assert_close(
        span.run(states, None, position=0, tuning=tuning), local.run(states, tuning), rtol=1e-4, atol=1e-4
    )
    got = span.run_backward(states, grads, tuning=span.fit_tuning(tuning))
    assert max(relative_errors(got, local.gradients(states, grads, tuning))) < FLOAT32_ERROR
    for num_noted in (2, SPAN.num_blocks):
        noted = span.run_backward(states, grads, tuning=span.fit_tuning(tuning), num_noted=num_noted)
        assert max(relative_errors(noted, got)) < ROUNDING


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "gpt_oss", "bloom", "opt"])
def test_gradients_of_padded_texts_are_those_of_the_local_model(model_type: str, side: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, model_type)))
    local, span = local_span(checkpoint), load_span(checkpoint, SPAN)
    tuning = random_tuning(local.blocks, SPAN, hidden_size=HIDDEN)
    padding = paddings(side)
    states, grads = states_and_gradients()
    grads = grads * padding["attention_mask"][..., None]
    if model_type in ("bloom", "opt"):  # they work positions out by themselves
        padding = {"attention_mask": padding["attention_mask"]}
    got = span.run_backward(states, grads, tuning=span.fit_tuning(tuning), **padding)
    plain = {name: tensor.long() for name, tensor in padding.items()}
    assert max(relative_errors(got, local.gradients(states, grads, tuning, **plain))) < FLOAT32_ERROR


def test_a_part_of_the_span_goes_back_by_itself(llama: Checkpoint, span: SpanModel) -> None:
    part = Span(3, 5)
    local = local_span(llama, part)
    tuning = random_tuning(local.blocks, part, hidden_size=HIDDEN)
    states, grads = states_and_gradients()
    got = span.run_backward(states, grads, blocks=part, tuning=tuning)
    assert max(relative_errors(got, local.gradients(states, grads, tuning))) < FLOAT32_ERROR


def test_parts_of_a_span_chain_their_gradients(span: SpanModel) -> None:
    states, grads = states_and_gradients()
    between = span.run(states, None, position=0, blocks=Span(2, 4))
    last = span.run_backward(between, grads, blocks=Span(4, 6))
    first = span.run_backward(states, last.inputs, blocks=Span(2, 4))
    torch.testing.assert_close(first.inputs, span.run_backward(states, grads).inputs, rtol=1e-4, atol=1e-5)


def test_rows_go_back_apart_and_their_tunings_gradients_add_up(llama: Checkpoint, span: SpanModel) -> None:
    tuning = random_tuning(lay_out(llama.config, torch.float32).blocks, SPAN, hidden_size=HIDDEN)
    states, grads = states_and_gradients()
    whole = span.run_backward(states, grads, tuning=tuning)
    first, second = (
        span.run_backward(states[row : row + 1], grads[row : row + 1], tuning=tuning) for row in range(BATCH)
    )
    assert first.tuning is not None
    assert second.tuning is not None
    together = Gradients(torch.cat([first.inputs, second.inputs]), first.tuning.plus(second.tuning))
    assert max(relative_errors(together, whole)) < FLOAT32_ERROR


def test_prompts_longer_than_the_text_get_no_gradient_beyond_it(llama: Checkpoint, span: SpanModel) -> None:
    local = local_span(llama)
    tuning = SpanTuning(SPAN, random_tuning(local.blocks, SPAN, hidden_size=HIDDEN, num_prompts=9).prompts)
    states, grads = states_and_gradients(tokens=6)
    got = span.run_backward(states, grads, tuning=tuning)
    assert max(relative_errors(got, local.gradients(states, grads, tuning))) < FLOAT32_ERROR
    assert got.tuning is not None
    assert got.tuning.prompts is not None
    assert not got.tuning.prompts[:, 6:].any()


def test_an_adapter_of_the_server_s_own_stays_active(llama: Checkpoint, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "poet", load_local_model(llama), seed=1)
    adapter = fit_adapter(open_adapter(AdapterPlace.parse(str(folder))), lay_out(llama.config, torch.float32))
    span = load_span(llama, SPAN, adapters=[adapter])
    local = local_span(llama, model=with_adapter(load_local_model(llama), folder))
    tuning = random_tuning(local.blocks, SPAN, hidden_size=HIDDEN)
    states, grads = states_and_gradients()
    got = span.run_backward(states, grads, tuning=tuning, adapter=adapter.adapter_id)
    assert max(relative_errors(got, local.gradients(states, grads, tuning))) < FLOAT32_ERROR
    without = span.run_backward(states, grads, tuning=tuning)
    assert max(relative_errors(without, got)) > 0.1
    for num_noted in (1, 3):
        trip = span.start_backward(states, grads, tuning=tuning, adapter=adapter.adapter_id, num_noted=num_noted)
        while not trip.is_done:
            span.run(states, None, position=0)  # without the adapter, between any two stages
            trip.go_on(1)
        assert max(relative_errors(trip.gradients, got)) < ROUNDING


def test_without_a_tuning_only_the_inputs_gradients_come(llama: Checkpoint, span: SpanModel) -> None:
    states, grads = states_and_gradients()
    got = span.run_backward(states, grads)
    expected = local_span(llama).gradients(states, grads, SpanTuning(SPAN))
    assert got.tuning is None
    assert relative_errors(Gradients(got.inputs, SpanTuning(SPAN)), expected)[0] < FLOAT32_ERROR


@pytest.mark.parametrize("kind", [Quantization.INT8, Quantization.NF4])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_quantized_weights_pass_gradients_as_the_weights_they_stand_for(
    model_type: str, kind: Quantization, tmp_path: Path
) -> None:
    """Up to the rounding of states to 16 bits, which the kernel's own forward does."""
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, model_type)))
    local, span = local_span(checkpoint), load_span(checkpoint, SPAN, quantization=kind)
    restore(local, span)
    tuning = random_tuning(local.blocks, SPAN, hidden_size=HIDDEN)
    states, grads = states_and_gradients()
    got = span.run_backward(states, grads, tuning=span.fit_tuning(tuning))
    assert max(relative_errors(got, local.gradients(states, grads, tuning))) < 1e-3


@pytest.mark.parametrize(("kind", "largest_error"), [(Quantization.INT8, 0.05), (Quantization.NF4, 1e-3)])
def test_bitsandbytes_passes_the_same_gradients(
    llama: Checkpoint, kind: Quantization, largest_error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With int8 it rounds states to 8 bits."""
    ours = load_span(llama, SPAN, quantization=kind)
    monkeypatch.setattr(quantization_module, "quantized_linear", bitsandbytes_linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes uses what torch has given another name
        theirs = load_span(llama, SPAN, quantization=kind)
        tuning = random_tuning(lay_out(llama.config, torch.float32).blocks, SPAN, hidden_size=HIDDEN)
        states, grads = states_and_gradients()
        theirs.run(states, None, position=0)
        got = theirs.run_backward(states, grads, tuning=theirs.fit_tuning(tuning))
    assert max(relative_errors(got, ours.run_backward(states, grads, tuning=tuning))) < largest_error


def restore(local: LocalSpan, span: SpanModel) -> None:
    """Gives the local model the weights that the span's quantized ones stand for."""
    for index, block in span._blocks.items():
        for path, layer in block.named_modules():
            if isinstance(layer, KernelLinear):
                restored = local.blocks[index].get_submodule(path)
                restored.weight.data = layer.weight if isinstance(restored, nn.Linear) else layer.weight.t()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_in_bfloat16_gradients_err_no_further_than_the_local_model_s(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, model_type)))
    span = load_span(checkpoint, SPAN, dtype=torch.bfloat16)
    truth, local = local_span(checkpoint), local_span(checkpoint, dtype=torch.bfloat16)
    tuning = random_tuning(truth.blocks, SPAN, hidden_size=HIDDEN)
    states, grads = (tensor.bfloat16() for tensor in states_and_gradients())
    got = span.run_backward(states, grads, tuning=tuning)
    assert got.inputs.dtype == torch.bfloat16
    assert got.tuning is not None
    assert {tensor.dtype for tensor in tensors_of(got.tuning)} == {torch.float32}
    exact = truth.gradients(states.float(), grads.float(), tuning)
    ours, theirs = relative_errors(got, exact), relative_errors(local.gradients(states, grads, tuning), exact)
    assert max(ours) < BFLOAT16_ERROR
    assert sum(ours) < 1.15 * sum(theirs)


def test_nothing_of_it_is_left_behind(llama: Checkpoint) -> None:
    """A session that decodes in between gets the bits that it would have got anyway."""
    span = load_span(llama, SPAN)
    classes = [type(module) for module in span._decoder.modules()]
    tuning = random_tuning(lay_out(llama.config, torch.float32).blocks, SPAN, hidden_size=HIDDEN)
    text, _ = states_and_gradients(batch=1, tokens=20)
    states, grads = states_and_gradients()

    def decoded(*, beside_training: bool) -> list[torch.Tensor]:
        cache = span.new_cache(1)
        answers = [span.run(text[:, :4], cache, position=0)]
        for position in range(4, 20):
            prepared = span.prepare(cache)
            if beside_training:
                span.run_backward(states, grads, tuning=tuning)
            prepared = prepared if position % 3 else None
            answers.append(span.run(text[:, position : position + 1], cache, position=position, prepared=prepared))
        return answers

    alone = decoded(beside_training=False)
    assert all(map(torch.equal, decoded(beside_training=True), alone))
    assert [type(module) for module in span._decoder.modules()] == classes
    assert not any("tuned_by" in vars(module) for module in span._decoder.modules())
    assert not any(parameter.requires_grad for parameter in span._decoder.parameters())


def test_sessions_that_decode_as_a_batch_and_gradients_do_not_touch_one_another(span: SpanModel) -> None:
    states, grads = states_and_gradients()
    pool = span.new_pool(2)
    caches = [span.new_cache(1, pool=pool) for _ in range(2)]
    for cache, text in zip(caches, states.split(1), strict=True):
        span.run(text[:, :-1], cache, position=0)

    def batch() -> torch.Tensor:
        pairs = zip(caches, states.split(1), strict=True)
        steps = [BatchedStep(cache, text[:, -1:], TOKENS - 1) for cache, text in pairs]
        return torch.cat(span.run_batch(steps))

    gradients = span.run_backward(states, grads).inputs
    together = batch()
    assert torch.equal(span.run_backward(states, grads).inputs, gradients)
    assert torch.equal(batch(), together)


def test_the_graph_of_a_single_token_is_not_kept(span: SpanModel) -> None:
    assert any(isinstance(module, JoinedLinear) for module in span._decoder.modules())
    before = num_graph_nodes()
    states, grads = states_and_gradients(batch=1, tokens=1)
    span.run_backward(states, grads)
    assert num_graph_nodes() == before


def test_a_round_trip_takes_as_many_stages_as_is_said(span: SpanModel) -> None:
    states, grads = states_and_gradients()
    for num_noted in range(1, SPAN.num_blocks + 1):
        trip = span.start_backward(states, grads, num_noted=num_noted)
        trip.go_on(num_stages(SPAN.num_blocks, num_noted) - 1)
        assert not trip.is_done
        trip.go_on(1)
        assert trip.is_done


@pytest.mark.parametrize("num_stages_taken", range(1, 10))
def test_nothing_is_left_of_a_round_trip_that_was_given_up(span: SpanModel, num_stages_taken: int) -> None:
    before = num_graph_nodes()
    states, grads = states_and_gradients()
    trip = span.start_backward(states, grads, num_noted=2)
    trip.go_on(num_stages_taken)
    assert num_graph_nodes() > before or num_stages_taken in (1, 2, 6, 8)
    del trip
    assert num_graph_nodes() == before


def num_graph_nodes() -> int:
    gc.collect()
    return sum(type(each) is torch.Tensor and each.grad_fn is not None for each in gc.get_objects())


@pytest.mark.parametrize(("failing", "is_forward"), [(2, True), (4, True), (2, False), (3, False), (5, False)])
def test_a_failure_in_any_block_changes_nothing(
    llama: Checkpoint, failing: int, is_forward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = load_span(llama, SPAN)
    tuning = random_tuning(lay_out(llama.config, torch.float32).blocks, SPAN, hidden_size=HIDDEN)
    states, grads = states_and_gradients()
    plain, tuned = (span.run(states, None, position=0, tuning=each) for each in (None, tuning))
    expected = span.run_backward(states, grads, tuning=tuning)
    mlp = type(span._blocks[failing].mlp)
    forward = mlp.forward

    def fail(module: Any, given: torch.Tensor) -> torch.Tensor:
        if module is span._blocks[failing].mlp and given.requires_grad != is_forward:
            raise MemoryError("out of memory")
        return forward(module, given)

    with monkeypatch.context() as patch:
        patch.setattr(mlp, "__call__", fail)
        with pytest.raises(MemoryError):
            span.run_backward(states, grads, tuning=tuning)
    assert torch.equal(span.run(states, None, position=0), plain)
    assert torch.equal(span.run(states, None, position=0, tuning=tuning), tuned)
    assert relative_errors(span.run_backward(states, grads, tuning=tuning), expected) == [0.0] * len(
        relative_errors(expected, expected)
    )


def test_the_caller_s_tensors_stay_what_they_were(llama: Checkpoint, span: SpanModel) -> None:
    tuning = random_tuning(lay_out(llama.config, torch.float32).blocks, SPAN, hidden_size=HIDDEN)
    given = [*states_and_gradients(), *tensors_of(tuning)]
    before = [tensor.clone() for tensor in given]
    span.run_backward(given[0], given[1], tuning=tuning)
    assert all(map(torch.equal, given, before))
    assert not any(tensor.requires_grad for tensor in given)


def test_what_comes_from_inference_mode_goes_back_too(llama: Checkpoint, span: SpanModel) -> None:
    """Also where the caller is in it himself."""
    unfitted = random_tuning(lay_out(llama.config, torch.float32).blocks, SPAN, hidden_size=HIDDEN)
    states, grads = states_and_gradients()
    padding = paddings("left")
    expected = span.run_backward(states, grads, tuning=unfitted, **padding)
    with torch.inference_mode():
        tuning = span.fit_tuning(
            SpanTuning(SPAN, unfitted.prompts.clone() if unfitted.prompts is not None else None, unfitted.layers)
        )
        padding = {name: tensor.clone() for name, tensor in padding.items()}
        got = span.run_backward(states.clone(), grads.clone(), tuning=tuning, **padding)
    assert relative_errors(got, expected) == [0.0] * len(relative_errors(expected, expected))


def test_gradients_of_another_shape_are_refused(span: SpanModel) -> None:
    states, grads = states_and_gradients()
    with pytest.raises(ValueError, match=r"the gradients have the shape \[2, 12, 64\], the inputs \[2, 13, 64\]"):
        span.run_backward(states, grads[:, 1:])


def test_a_model_that_does_more_between_its_blocks_is_not_trained_through(llama: Checkpoint) -> None:
    span = load_span(llama, SPAN)
    span.can_train = False
    with pytest.raises(UnsupportedModelError, match=r"no gradients come back through a LlamaModel: between its blocks"):
        span.run_backward(*states_and_gradients())


def test_rotary_embeddings_that_follow_the_longest_text_do_so_on_the_way_back(tmp_path: Path) -> None:
    """They are made anew while a text runs in inference mode, and taken back for a short one."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    folder = save_tiny_checkpoint(tmp_path, "llama", max_position_embeddings=16, rope_parameters=rope)
    checkpoint = open_checkpoint(str(folder))
    local, span = local_span(checkpoint), load_span(checkpoint, SPAN)
    for tokens in (30, 8, 20):
        states, grads = states_and_gradients(tokens=tokens)
        torch.testing.assert_close(span.run(states, None, position=0), local.run(states), rtol=1e-4, atol=1e-4)
        expected = local.gradients(states, grads, SpanTuning(SPAN)).inputs
        torch.testing.assert_close(span.run_backward(states, grads).inputs, expected, rtol=1e-4, atol=1e-4)
