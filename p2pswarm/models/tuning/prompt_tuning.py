"""Prompt tuning: virtual tokens in front of each text are trained (2104.08691), and in deep prompt tuning something
added to them at each block too (Petals' `deep_ptune`, after 2110.07602)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from p2pswarm.client.local_adapter import DEEP_PROMPT_NAME, PROMPT_NAME
from p2pswarm.client.tuning import Tuning
from p2pswarm.models.tuning.method import TuningMethod


class PromptTuning(TuningMethod):
    """peft's `PROMPT_TUNING`. Servers need to know nothing of it: virtual tokens are tokens."""

    def __init__(self, adapter_config: Mapping[str, Any], prompts: torch.Tensor) -> None:
        """`prompts`: [virtual tokens, embedding size], what training begins with."""
        super().__init__(adapter_config)
        self.prompts = nn.Parameter(prompts.detach().to(torch.float32, copy=True))

    def prefix(self) -> torch.Tensor | None:
        return self.prompts

    def saved_tensors(self, blocks_path: str) -> dict[str, torch.Tensor]:
        return {PROMPT_NAME: self.prompts}


class DeepPromptTuning(PromptTuning):
    """Virtual tokens, and what is added to their hidden states where they enter each block."""

    def __init__(self, adapter_config: Mapping[str, Any], prompts: torch.Tensor, deep_prompts: torch.Tensor) -> None:
        """`deep_prompts`: [blocks, virtual tokens, hidden]."""
        super().__init__(adapter_config, prompts)
        self.deep_prompts = nn.Parameter(deep_prompts.detach().to(torch.float32, copy=True))

    def tuning(self) -> Tuning | None:
        return Tuning(prompts=self.deep_prompts)

    def saved_tensors(self, blocks_path: str) -> dict[str, torch.Tensor]:
        return {**super().saved_tensors(blocks_path), DEEP_PROMPT_NAME: self.deep_prompts}


def sampled_prompts(embeddings: nn.Module, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """[tokens, embedding size]: embeddings of tokens drawn from the vocabulary, from where training goes faster than
    from noise (2104.08691, section 3.2)."""
    vocabulary_size = int(embeddings.num_embeddings)  # type: ignore[arg-type]  # an nn.Embedding, or like one
    token_ids = torch.randint(vocabulary_size, (num_tokens,), generator=generator)
    with torch.no_grad():
        embedded: torch.Tensor = embeddings(token_ids.to(next(embeddings.parameters()).device))
    return embedded.float()
