"""A model that is being tuned: its trained parameters, their optimizer, and single steps. A plain PyTorch loop's body.

Model and blocks may be anywhere; nothing here knows of a swarm. Nothing is drawn at random either: models are not put
into training mode, in which some drop activations, because servers never do.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from p2pswarm.core.errors import CheckpointError, ConfigError
from swarm_cli.finetuning.batches import Batch
from swarm_cli.finetuning.options import HEAD_RATE_SHARE, TrainingOptions
from swarm_cli.finetuning.training_state import TrainingState

MAX_GRADIENT_NORM = 1.0
"""Of all gradients of a step together; longer ones are shortened."""


@dataclass(frozen=True, slots=True)
class Validation:
    """How a model does on rows that it does not learn."""

    loss: float
    """Mean over tokens, or over rows of a classifier."""
    accuracy: float | None = None
    """Share of rows that a classifier labels rightly; None: no classifier."""

    def as_json(self) -> dict[str, float]:
        accuracy = {} if self.accuracy is None else {"accuracy": round(self.accuracy, 4)}
        return {"loss": round(self.loss, 6), **accuracy}


class Training:
    """Made for each run of the program; `restore` brings back what an earlier one saved."""

    def __init__(self, model: Any, options: TrainingOptions, head_names: Iterable[str] = ()) -> None:
        """`model`: gives a `loss` when it is called with labels. `head_names`: of parameters that are a head's."""
        self.model = model
        self.options = options
        self.step = 0
        """Steps taken."""
        self.parameters: Mapping[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        heads = frozenset(head_names)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [parameter], "share": HEAD_RATE_SHARE if name in heads else 1.0}
                for name, parameter in self.parameters.items()
            ],
            lr=options.learning_rate,
            weight_decay=0.0,
        )

    @property
    def num_values(self) -> int:
        """That are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def compute_gradients(self, batch: Batch) -> float:
        """The loss of the batch. Changes nothing but gradients, so it can be given up half-way. Raises `ConfigError`
        where training has run off."""
        self._optimizer.zero_grad()
        loss: torch.Tensor = self.model(**batch.named(), use_cache=False).loss
        if not math.isfinite(loss.item()):
            raise ConfigError(
                f"the loss of step {self.step + 1} is {loss.item()}: try a smaller --learning-rate than "
                f"{self.options.learning_rate:g}"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def update(self) -> None:
        """Takes the step that the gradients show."""
        nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRADIENT_NORM)
        rate = self.options.learning_rate * self.options.rate_share(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self._optimizer.step()
        self.step += 1

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> Validation:
        loss_sum, num_learned, num_right, num_rows = 0.0, 0, 0, 0
        for batch in batches:
            output = self.model(**batch.named(), use_cache=False)
            loss_sum += output.loss.item() * batch.num_learned
            num_learned += batch.num_learned
            if batch.labels.ndim == 1:
                num_right += int((output.logits.argmax(dim=-1) == batch.labels).sum())
                num_rows += len(batch.labels)
        return Validation(loss_sum / num_learned, num_right / num_rows if num_rows else None)

    def state(self) -> TrainingState:
        memory = {
            name: self._optimizer.state[parameter]
            for name, parameter in self.parameters.items()
            if parameter in self._optimizer.state
        }
        return TrainingState(self.step, self.options.as_json(), self.parameters, memory)

    def restore(self, state: TrainingState) -> None:
        """Goes on from there. Raises `CheckpointError` where the state is of other parameters."""
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        saved = {name: tensor.shape for name, tensor in state.parameters.items()}
        if shapes != saved:
            raise CheckpointError(
                f"the saved training is of {len(saved)} parameters whose names or shapes are not those of the "
                f"{len(shapes)} that are trained now"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.parameters[name])
                if name in state.memory:
                    self._optimizer.state[parameter] = dict(state.memory[name])
        self.step = state.step
