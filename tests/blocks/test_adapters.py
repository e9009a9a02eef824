"""A span computes with an adapter what peft computes, whatever its layers are stored as; anything but LoRA is
refused.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import save_adapter, with_adapter

from p2pswarm.blocks.adapters import Adapter, fit_adapter
from p2pswarm.blocks.architecture import lay_out
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.blocks.span_steps import BatchedStep
from p2pswarm.checkpoint.adapter_files import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from p2pswarm.checkpoint.adapter_place import AdapterPlace
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.core.errors import CheckpointError, ConfigError
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

HIDDEN = 64
SPAN = Span(2, 6)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama")))


@pytest.fixture(scope="module")
def local(checkpoint: Checkpoint) -> Any:
    return load_local_model(checkpoint)


@pytest.fixture(scope="module")
def poet(local: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Changes layers that are joined in memory (queries and values), and one that is not."""
    return save_adapter(tmp_path_factory.mktemp("adapters") / "poet", local, seed=1)


@pytest.fixture(scope="module")
def clerk(local: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other layers, other ranks and scales in some of them."""
    options = {
        "target_modules": "all-linear",
        "r": 6,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2, r"layers\.3\..*gate_proj": 8},
        "alpha_pattern": {"self_attn.k_proj": 3},
    }
    return save_adapter(tmp_path_factory.mktemp("adapters") / "clerk", local, seed=2, **options)


def fitted(checkpoint: Checkpoint, folder: Path) -> Adapter:
    layout = lay_out(checkpoint.config, torch.float32)
    return fit_adapter(open_adapter(AdapterPlace.parse(str(folder))), layout)


def spanned(checkpoint: Checkpoint, *folders: Path, span: Span = SPAN, **options: Any) -> SpanModel:
    return load_span(checkpoint, span, adapters=[fitted(checkpoint, folder) for folder in folders], **options)


def through_blocks(model: Any, states: torch.Tensor, span: Span = SPAN) -> torch.Tensor:
    """What transformers' own blocks make of the states."""
    places = torch.arange(states.shape[1])[None]
    rotary = model.model.rotary_emb(states, places)
    with torch.inference_mode():
        for index in range(span.start, span.end):
            states = model.model.layers[index](states, position_embeddings=rotary, position_ids=places)
    return states


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_prompts_and_tokens_go_through_the_adapter_that_is_asked_for(
    checkpoint: Checkpoint, local: Any, poet: Path, clerk: Path
) -> None:
    model = spanned(checkpoint, poet, clerk)
    states = torch.randn(1, 9, HIDDEN)
    references = [(None, local), *zip(model.adapter_ids, map(with_adapter, [local] * 2, [poet, clerk]), strict=True)]
    expected = [through_blocks(reference, states) for _, reference in references]
    assert not torch.allclose(expected[0], expected[1], atol=0.1)
    assert not torch.allclose(expected[1], expected[2], atol=0.1)
    for (adapter, _), wanted in zip(references, expected, strict=True):
        cache = model.new_cache(1)
        answers = [model.run(states[:, :7], cache, position=0, adapter=adapter)]
        answers.append(model.run(states[:, 7:8], cache, position=7, adapter=adapter))
        prepared = model.prepare(cache)
        assert prepared is not None
        answers.append(model.run(states[:, 8:], cache, position=8, prepared=prepared, adapter=adapter))
        assert_same(torch.cat(answers, dim=1), wanted)


def test_sessions_decode_together_with_one_adapter(checkpoint: Checkpoint, poet: Path) -> None:
    model = spanned(checkpoint, poet)
    (adapter,) = model.adapter_ids
    pool = model.new_pool(4)
    states = [torch.randn(1, length + 1, HIDDEN) for length in (5, 8)]
    caches = [model.new_cache(1, pool=pool) for _ in states]
    for cache, prompt in zip(caches, states, strict=True):
        model.run(prompt[:, :-1], cache, position=0, adapter=adapter)
    steps = [
        BatchedStep(cache, prompt[:, -1:], prompt.shape[1] - 1) for cache, prompt in zip(caches, states, strict=True)
    ]
    for answer, prompt in zip(model.run_batch(steps, adapter), states, strict=True):
        assert_same(answer, model.run(prompt, None, position=0, adapter=adapter)[:, -1:])


def test_without_adapters_a_span_is_what_it_was_before(checkpoint: Checkpoint, poet: Path) -> None:
    states = torch.randn(2, 5, HIDDEN)
    plain = load_span(checkpoint, SPAN).run(states, None, position=0)
    assert torch.equal(spanned(checkpoint, poet).run(states, None, position=0), plain)


def test_a_part_of_the_span_takes_its_part_of_the_adapter(checkpoint: Checkpoint, local: Any, poet: Path) -> None:
    model = spanned(checkpoint, poet)
    states = torch.randn(1, 5, HIDDEN)
    answer = model.run(states, None, position=0, blocks=Span(3, 5), adapter=model.adapter_ids[0])
    assert_same(answer, through_blocks(with_adapter(local, poet), states, Span(3, 5)))


def test_an_adapter_that_the_span_does_not_have_is_an_error(checkpoint: Checkpoint, poet: Path) -> None:
    model = spanned(checkpoint, poet)
    with pytest.raises(ValueError, match=r"the span has the adapters poet@[0-9a-f]{16}, not clerk"):
        model.run(torch.randn(1, 1, HIDDEN), None, position=0, adapter="clerk")


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.NF4])
def test_quantized_layers_take_adapters_too(checkpoint: Checkpoint, poet: Path, quantization: Quantization) -> None:
    """The first block's answer differs from the one without by what the adapter adds, not by more."""
    span = Span(2, 3)
    states = torch.randn(1, 6, HIDDEN)
    exact, quantized = (
        spanned(checkpoint, poet, span=span, quantization=kind) for kind in (Quantization.NONE, quantization)
    )
    adapter = exact.adapter_ids[0]

    def added(model: SpanModel) -> torch.Tensor:
        return model.run(states, None, position=0, adapter=adapter) - model.run(states, None, position=0)

    assert torch.dist(added(quantized), added(exact)) < 0.35 * added(exact).norm()


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("qwen2", {"target_modules": ["q_proj", "k_proj"]}),
        ("phi3", {"target_modules": ["qkv_proj"]}),
        ("mixtral", {"target_modules": ["o_proj"]}),
    ],
)
def test_other_architectures_too(tmp_path: Path, model_type: str, options: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path / "model", model_type)))
    local = load_local_model(checkpoint)
    folder = save_adapter(tmp_path / "adapter", local, seed=3, **options)
    merged = with_adapter(local, folder)
    whole = spanned(checkpoint, folder, span=Span(0, 8))
    layers = lay_out(checkpoint.config, torch.float32).blocks_path
    seen: list[torch.Tensor] = []
    blocks = merged.get_submodule(layers)
    blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    blocks[7].register_forward_hook(lambda *called: seen.append(called[2]))
    with torch.inference_mode():
        merged(torch.tensor([[5, 17, 99, 3]]))
    first, last = (states[0] if isinstance(states, tuple) else states for states in seen)
    assert_same(whole.run(first, None, position=0, adapter=whole.adapter_ids[0]), last)


def test_only_the_tensors_of_the_span_are_read(checkpoint: Checkpoint, poet: Path) -> None:
    adapter = fitted(checkpoint, poet)
    read: list[str] = []
    real_read = adapter.source.read
    adapter.source.read = lambda names: read.extend(names) or real_read(names)  # type: ignore[method-assign,func-returns-value]
    loaded = adapter.load(Span(2, 4), dtype=torch.float32, device=torch.device("cpu"))
    assert sorted(loaded.blocks) == [2, 3]
    assert len(read) == 2 * 3 * 2
    assert all(".layers.2." in name or ".layers.3." in name for name in read)
    assert adapter.block_bytes(2, torch.float32) == 4 * 4 * (64 + 64 + 64 + 32 + 128 + 64)


def test_names_tell_adapters_apart_that_compute_something_else(poet: Path, clerk: Path, tmp_path: Path) -> None:
    def name(folder: Path, called: str = "") -> str:
        return open_adapter(AdapterPlace.parse(f"{folder}{called}")).adapter_id

    def changed(key: str, value: object) -> Path:
        copy = Path(shutil.copytree(poet, tmp_path / key / "poet"))
        config = json.loads((copy / CONFIG_NAME).read_text())
        (copy / CONFIG_NAME).write_text(json.dumps(config | {key: value}))
        return copy

    assert name(poet).startswith("poet@")
    assert name(poet, "=bard") == name(poet).replace("poet", "bard")
    assert name(clerk, "=poet") != name(poet)
    assert name(changed("lora_alpha", 9)) != name(poet)
    assert name(changed("peft_version", "0.1")) == name(poet)


@pytest.mark.parametrize("text", ["", "=poet", "folder=two words", "folder=", f"folder={'x' * 101}"])
def test_a_place_without_a_proper_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="wanted PATH or PATH=NAME"):
        AdapterPlace.parse(text)


Spoil = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]
"""Changes config and tensors."""
PREFIX = "base_model.model.model.layers"
Q_DOWN = f"{PREFIX}.2.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda config, _: config.update(peft_type="IA3"), "of the type IA3, only LORA"),
        (lambda config, _: config.update(use_dora=True), "use_dora = True, which is not supported"),
        (lambda config, _: config.update(bias="all"), "bias = all, which is not supported"),
        (lambda config, _: config.update(modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\]"),
        (lambda config, _: config.update(use_new_trick={"a": 1}), "use_new_trick = {'a': 1}, which is not supported"),
        (lambda config, _: config.update(init_lora_weights="pissa"), "changes the model's own weights"),
        (lambda config, _: config.update(r=5), r"has the shape \[4, 128\], this model and rank 5 want"),
        (lambda config, _: config.update(r=0), "the rank 0"),
        (lambda config, _: config.update(lora_alpha="much"), "the alpha 'much'"),
        (lambda config, _: config.update(rank_pattern={"(": 3}), "rank_pattern that cannot be read"),
        (lambda _, tensors: tensors.clear(), "holds no tensors"),
        (lambda _, tensors: tensors.pop(Q_DOWN), "has only lora_B of model.layers.2.self_attn.q_proj"),
        (
            lambda _, tensors: tensors.update({Q_DOWN: torch.zeros(4, 65)}),
            r"has the shape \[4, 65\], this model and rank 4 want \[4, 64\]",
        ),
        (
            lambda _, tensors: tensors.update({f"{PREFIX}.8.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}),
            r"in none of the blocks model.layers.0 to 7",
        ),
        (
            lambda _, tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}),
            "lm_head, which is in none of the blocks",
        ),
        (
            lambda _, tensors: tensors.update({f"{PREFIX}.1.mlp.w1.lora_A.weight": torch.zeros(4, 64)}),
            "adapts model.layers.1.mlp.w1, which this model does not have",
        ),
        (
            lambda _, tensors: tensors.update(
                {f"{PREFIX}.1.mlp.lora_{side}.weight": torch.zeros(4, 64) for side in "AB"}
            ),
            "only linear layers",
        ),
        (
            lambda _, tensors: tensors.update({Q_DOWN.replace("A.weight", "magnitude_vector"): torch.zeros(4)}),
            "is no lora_A or lora_B of a linear layer",
        ),
        (lambda _, tensors: tensors[Q_DOWN].fill_(float("nan")), "not finite"),
    ],
)
def test_what_is_not_plain_lora_for_this_model_is_refused(
    checkpoint: Checkpoint, poet: Path, tmp_path: Path, spoil: Spoil, complaint: str
) -> None:
    config, tensors = json.loads((poet / CONFIG_NAME).read_text()), load_file(poet / WEIGHTS_NAME)
    spoil(config, tensors)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=complaint):
        spanned(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "has no adapter_config.json"),
        ({CONFIG_NAME: "{}"}, "has no adapter_model.safetensors"),
        ({CONFIG_NAME: "{}", "adapter_model.bin": ""}, r"refused: .* a pickle \(adapter_model.bin\)"),
        ({CONFIG_NAME: "[]", WEIGHTS_NAME: "12345678"}, "holds a list, not a config"),
        ({CONFIG_NAME: "{}", WEIGHTS_NAME: "12345678"}, "damaged or no safetensors file"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        open_adapter(AdapterPlace.parse(str(tmp_path)))
