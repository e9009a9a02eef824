"""Which examples make up each step's batch, and the batch as tensors. Pure: the same seed gives the same batches."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swarm_cli.finetuning.examples import Example

IGNORED = -100
"""The label of tokens that are not learned, in transformers and in torch."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What the model is called with."""

    input_ids: torch.Tensor
    """[rows, tokens], filled up at the right."""
    attention_mask: torch.Tensor
    labels: torch.Tensor
    """[rows, tokens], or [rows] of a classifier."""

    @property
    def num_tokens(self) -> int:
        """Without what fills up."""
        return int(self.attention_mask.sum())

    @property
    def num_learned(self) -> int:
        """Over how many the loss is a mean: tokens that have one before them, or rows of a classifier."""
        if self.labels.ndim == 1:
            return len(self.labels)
        return int((self.labels[:, 1:] != IGNORED).sum())

    def named(self) -> dict[str, Any]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    return -(-num_examples // batch_size)


def examples_of_step(step: int, num_examples: int, batch_size: int, seed: int) -> list[int]:
    """Which examples step number `step`, from 0, learns from: each epoch takes all, in an order of its own."""
    epoch, within = divmod(step, steps_per_epoch(num_examples, batch_size))
    order = list(range(num_examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[within * batch_size : (within + 1) * batch_size]


def make_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """`pad_id` goes where a row is shorter than the longest; nobody sees it."""
    length = max(len(example.token_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.int64)
    labels = torch.full((len(examples), length), IGNORED)
    for row, example in enumerate(examples):
        num_tokens = len(example.token_ids)
        token_ids = torch.tensor(example.token_ids)
        input_ids[row, :num_tokens] = token_ids
        attention_mask[row, :num_tokens] = 1
        labels[row, example.num_given : num_tokens] = token_ids[example.num_given :]
    if examples[0].label is not None:
        labels = torch.tensor([example.label for example in examples])
    return Batch(input_ids, attention_mask, labels)


def batches_by_length(examples: Sequence[Example], batch_size: int, pad_id: int) -> list[Batch]:
    """All of them once, those of about the same length together: for validation."""
    in_order = sorted(examples, key=lambda example: len(example.token_ids))
    return [make_batch(in_order[start : start + batch_size], pad_id) for start in range(0, len(in_order), batch_size)]
