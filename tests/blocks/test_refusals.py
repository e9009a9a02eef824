from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from p2pswarm.blocks.architecture import lay_out
from p2pswarm.core.errors import UnsupportedModelError
from p2pswarm.testing.tiny_checkpoints import tiny_config


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "running state"),
        ("jamba", "running state"),
        ("qwen3_next", "running state"),
        ("falcon_h1", "running state"),
        ("deepseek_v32", "selected tokens"),
        ("bart", "an encoder and a decoder"),
        ("bert", "does not take"),
        ("rwkv", "does not take past_key_values"),
        ("t5", "an encoder and a decoder"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(model_type: str, reason: str) -> None:
    config = CONFIG_MAPPING[model_type]()

    with pytest.raises(UnsupportedModelError, match=reason):
        lay_out(config, torch.float32)


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}])
def test_weights_quantised_already_are_refused(settings: dict[str, Any]) -> None:
    config = tiny_config("llama")
    config.quantization_config = settings

    with pytest.raises(UnsupportedModelError, match=f"quantised already \\({settings['quant_method']}\\)"):
        lay_out(config, torch.float32)
