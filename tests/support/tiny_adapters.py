"""LoRA adapters as real peft saves them, with random weights that change every token, and what peft computes with them.

peft is imported where it is used: that takes seconds.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def save_adapter(folder: Path, local: Any, *, seed: int, **options: Any) -> Path:
    """An adapter of the model `local`; `options` are those of peft's `LoraConfig`. Returns the folder."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    with torch.random.fork_rng(), _without_pefts_warning():
        torch.manual_seed(seed)
        config = LoraConfig(init_lora_weights=False, **{**settings, **options})
        model: Any = get_peft_model(copy.deepcopy(local), config)
        model.save_pretrained(folder, save_embedding_layers=False)  # else it asks the hub for the model
    return folder


def with_adapter(local: Any, folder: Path) -> Any:
    """The model `local` with the adapter merged into a copy of it, by peft."""
    from peft import PeftModel

    with _without_pefts_warning():
        merged: Any = PeftModel.from_pretrained(copy.deepcopy(local), str(folder)).merge_and_unload()
    return merged.eval()


@contextmanager
def _without_pefts_warning() -> Iterator[None]:
    """peft asks transformers for something by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing", category=FutureWarning)
        yield
