"""Tiny models of any architecture with random weights, saved as a Hugging Face folder: what exactness is tested with.

The weights are large enough that every block changes the result, so that a block left out, run twice or run at a wrong
position shows in the logits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NUM_BLOCKS = 8
VOCABULARY_SIZE = 128
SLIDING_WINDOW = 8
"""Tokens; shorter than any test's prompt."""
SHARD_SIZE = "300KB"

COMMON_OPTIONS: Mapping[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED_HEADS: Mapping[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
FEW_EXPERTS: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "llama": GROUPED_HEADS,
    "mistral": {**GROUPED_HEADS, "sliding_window": SLIDING_WINDOW},
    "mixtral": {**GROUPED_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {**GROUPED_HEADS, "sliding_window": SLIDING_WINDOW},
    "gemma3_text": {**GROUPED_HEADS, "sliding_window": SLIDING_WINDOW},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": GROUPED_HEADS,
    "qwen3_moe": {**GROUPED_HEADS, **FEW_EXPERTS},
    "phi3": {"num_key_value_heads": 2},
    "bloom": {},
    "falcon": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_oss": {
        **GROUPED_HEADS,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": SLIDING_WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "olmo2": {"num_key_value_heads": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}
"""The seventeen families that every release is tested with, and what each needs beyond `COMMON_OPTIONS`."""


def tiny_config(model_type: str, **options: Any) -> "PretrainedConfig":
    """A config of the type with eight blocks; `options` go before the defaults. Raises what the config class raises."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**{**COMMON_OPTIONS, **OPTIONS.get(model_type, {}), **options})


def save_tiny_checkpoint(
    folder: Path, model_type: str, *, seed: int = 0, sharded: bool = False, **options: Any
) -> Path:
    """A folder with the config and the safetensors of a tiny random model, in one file or several; returns it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **options), dtype=torch.float32)  # type: ignore[no-untyped-call]
    randomize(model, seed)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE if sharded else "1GB")
    return folder


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draws every parameter anew: matrices keep the size of what goes through them, vectors move off their start."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim >= 2:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(noise.to(parameter.dtype), alpha=0.1)


def save_tiny_tokenizer(folder: Path, vocabulary_size: int = VOCABULARY_SIZE) -> None:
    """A tokenizer for the folder's model: one token a word `w3` ... `w127`, after `<pad>`, `<s>` and `</s>`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary = special | {f"w{index}": index for index in range(len(special), vocabulary_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    ).save_pretrained(folder)
