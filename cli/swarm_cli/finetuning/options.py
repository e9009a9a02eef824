"""What a training is: everything that decides its losses, checked once and kept with what it has saved."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from p2pswarm.core.errors import ConfigError

LEARNING_RATES: Mapping[str, float] = {"ptune": 2e-2, "deep_ptune": 1e-2, "lora": 1e-3}
"""Of each method, where none is given; found with SmolLM2 and rows of a few dozen tokens."""
HEAD_RATE_SHARE = 0.1
"""A classifier's head learns from normed states, whose values are much larger than those of embeddings: at the full
rate of a prompt its answers leap about."""
WARM_UP_SHARE = 0.05
"""Of all steps: the learning rate rises from near 0, while Adam has seen few gradients."""
MAY_CHANGE = frozenset({"num_steps"})
"""When training goes on: more steps than were planned, with the learning rate that they have by the longer plan."""


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """One training's."""

    model_id: str
    method: str
    data: str
    """Fingerprint of the rows that are learned, in order."""
    num_steps: int
    batch_size: int
    learning_rate: float
    rank: int
    target_modules: str | list[str] | None
    prompt_length: int
    max_tokens: int
    seed: int

    def rate_share(self, step: int) -> float:
        """Of the learning rate, in step number `step` from 0: a short rise, then straight down to 0 at the end."""
        warm_up = max(1, round(WARM_UP_SHARE * self.num_steps))
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return (self.num_steps - step) / max(1, self.num_steps - warm_up)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def check_goes_on(self, saved: Mapping[str, Any], place: str) -> None:
        """Raises `ConfigError` where what was saved is of another training."""
        names = [field.name for field in fields(self) if field.name not in MAY_CHANGE]
        others = [name for name in names if saved.get(name) != getattr(self, name)]
        if others:
            told = "; ".join(f"{name} was {saved.get(name)}, now {getattr(self, name)}" for name in others)
            raise ConfigError(f"{place} is of another training: {told}. Go on as it began, or give another --output")
