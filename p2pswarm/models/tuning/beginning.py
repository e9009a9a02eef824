"""Where training begins: a `TuningMethod` for a model from options, or from an adapter that was saved before."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from p2pswarm.blocks.architecture import lay_out
from p2pswarm.blocks.loading import LOADING
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.local_adapter import DEEP_PROMPT_TUNING, LORA, LocalAdapter
from p2pswarm.core.errors import ConfigError
from p2pswarm.models.tuning.lora_tuning import LoraTuning, drawn_pairs
from p2pswarm.models.tuning.method import TuningMethod
from p2pswarm.models.tuning.options import TuningOptions
from p2pswarm.models.tuning.prompt_tuning import DeepPromptTuning, PromptTuning, sampled_prompts
from p2pswarm.models.tuning.target_modules import find_targets, resolve


def new_method(options: TuningOptions, model: DistributedModel, about: Mapping[str, Any]) -> TuningMethod:
    """`about`: what peft wants to know of the model and its training. Raises `ConfigError`."""
    generator = torch.Generator().manual_seed(options.seed)
    match options.tuning_mode:
        case "lora":
            return _new_lora(options, model, about, generator)
        case "ptune":
            return PromptTuning(*_new_prompts(options, model, about, generator))
        case "deep_ptune":
            config, prompts = _new_prompts(options, model, about, generator)
            facts = model.servers.facts
            deep_prompts = torch.zeros(facts.num_blocks, options.pre_seq_len, facts.hidden_size)
            return DeepPromptTuning({**config, "peft_type": DEEP_PROMPT_TUNING}, prompts, deep_prompts)


def method_from(adapter: LocalAdapter) -> TuningMethod:
    """To go on with its training. Raises `ConfigError` for what cannot be trained here."""
    if dropout := adapter.config.get("lora_dropout"):
        raise ConfigError(
            f"the adapter was trained with lora_dropout {dropout}, which servers do not apply: to train it further "
            "without, write 0 there in its adapter_config.json"
        )
    if adapter.kind == LORA:
        return LoraTuning(adapter.config, adapter.pairs)
    assert adapter.prompts is not None
    if adapter.deep_prompts is None:
        return PromptTuning(adapter.config, adapter.prompts)
    return DeepPromptTuning(adapter.config, adapter.prompts, adapter.deep_prompts)


def _new_lora(
    options: TuningOptions, model: DistributedModel, about: Mapping[str, Any], generator: torch.Generator
) -> LoraTuning:
    from peft import LoraConfig

    with LOADING:
        layout = lay_out(model.checkpoint.config, torch.float32, model.head)
    target_modules = resolve(options.target_modules, layout)
    targets = find_targets(target_modules, layout)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=target_modules,
        fan_in_fan_out=any(target.is_stored_by_inputs for target in targets),
        **about,
    )
    scale = options.lora_alpha / options.lora_rank
    return LoraTuning(_as_json(config), drawn_pairs(targets, options.lora_rank, scale, generator))


def _new_prompts(
    options: TuningOptions, model: DistributedModel, about: Mapping[str, Any], generator: torch.Generator
) -> tuple[dict[str, Any], torch.Tensor]:
    from peft import PromptTuningConfig

    prompts = sampled_prompts(model.shell.get_input_embeddings(), options.pre_seq_len, generator)
    config = PromptTuningConfig(
        num_virtual_tokens=options.pre_seq_len,
        token_dim=prompts.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=model.shell.config.num_attention_heads,
        num_layers=model.servers.facts.num_blocks,
        **about,
    )
    return _as_json(config), prompts


def _as_json(config: Any) -> dict[str, Any]:
    """As it will be read again."""
    written: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=sorted))
    return written
