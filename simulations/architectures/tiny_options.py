"""What some model types need, beyond the usual tiny options, to be made tiny.

Types not named here are made with `GUESSES`, the first of them that gives a model which runs.
"""

from collections.abc import Mapping
from typing import Any

from p2pswarm.testing.tiny_checkpoints import FEW_EXPERTS, GROUPED_HEADS, SLIDING_WINDOW

EXPERTS: Mapping[str, Any] = {
    **FEW_EXPERTS,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT_ATTENTION: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    **EXPERTS,
}
DEFAULT_ROPE: Mapping[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}

GUESSES: tuple[Mapping[str, Any], ...] = (
    {**GROUPED_HEADS, **EXPERTS, "sliding_window": SLIDING_WINDOW, "use_sliding_window": True},
    {**GROUPED_HEADS, **EXPERTS, **DEFAULT_ROPE},
    {**GROUPED_HEADS, **EXPERTS},
    GROUPED_HEADS,
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 16},
    LATENT_ATTENTION,
    {},
)

MORE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]], "window_size": SLIDING_WINDOW},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 8,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "cohere_compass_text": {
        **GROUPED_HEADS,
        "sliding_window": SLIDING_WINDOW,
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), DEFAULT_ROPE["rope_parameters"]),
    },
    "lfm2": {**GROUPED_HEADS, "layer_types": ["conv", "full_attention"] * 4},
    "lfm2_moe": {**GROUPED_HEADS, "layer_types": ["conv", "full_attention"] * 4},
    "gemma4_text": {
        **GROUPED_HEADS,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 0,
        "sliding_window": SLIDING_WINDOW,
    },
    "deepseek_v2": {**LATENT_ATTENTION, "topk_method": "greedy", "num_experts_per_tok": 2},
    "longcat_flash": {
        **LATENT_ATTENTION,
        "num_layers": 4,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "head_dim": 8,
    },
    "llama4_text": {
        **GROUPED_HEADS,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": SLIDING_WINDOW,
    },
}
