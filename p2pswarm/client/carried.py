"""What a client brings along with its texts, so that any server can serve them tuned: virtual tokens and a `Tuning`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from p2pswarm.client.tuning import Tuning


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """Of a session, or of passes without one. The tensors may require gradients."""

    prefix: torch.Tensor | None = None
    """[virtual tokens, embedding size]: goes in front of every text, as embeddings."""
    tuning: Tuning | None = None


CarriedSource = Callable[[], Carried]
"""Gives what is carried now: what is being trained changes from step to step."""

NOTHING = Carried()


def nothing_carried() -> Carried:
    return NOTHING
