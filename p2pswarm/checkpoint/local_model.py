"""The whole model of a checkpoint in this process: what a swarm's answers are compared with."""

from typing import TYPE_CHECKING, Any

import torch

from p2pswarm.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_local_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """Transformers' own causal language model with all of the checkpoint's tensors, ready to generate."""
    from transformers import AutoModelForCausalLM

    model_class: Any = AutoModelForCausalLM._model_mapping[type(checkpoint.config)]
    model: PreTrainedModel = model_class.from_pretrained(
        None,
        config=checkpoint.config,
        state_dict=checkpoint.read(checkpoint.tensor_names),
        dtype=dtype,
    )
    if checkpoint.generation_config is not None:
        model.generation_config = checkpoint.generation_config
    model.train(False)
    return model
