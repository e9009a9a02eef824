"""The loop of a training: steps, a look at rows held out now and then, and saving, so that nothing is lost by stopping.

Who watches is told by a `Listener`; the loop prints nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from swarm_cli.finetuning.batches import Batch, examples_of_step, make_batch
from swarm_cli.finetuning.examples import Example
from swarm_cli.finetuning.stopping import Stopping
from swarm_cli.finetuning.training import Training, Validation


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step that was taken."""

    step: int
    """From 1."""
    loss: float
    """Of its batch, before the step."""
    num_tokens: int
    duration_s: float


class Listener(Protocol):
    def on_step(self, report: StepReport) -> None: ...

    def on_validation(self, step: int, validation: Validation) -> None:
        """After so many steps; 0: before the first."""
        ...


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often, in steps."""

    validate_every: int
    save_every: int


@dataclass(frozen=True, slots=True)
class Examples:
    """As tokens."""

    learned: Sequence[Example]
    held_out: Sequence[Batch]
    pad_id: int

    def batch_of_step(self, training: Training) -> Batch:
        options = training.options
        chosen = examples_of_step(training.step, len(self.learned), options.batch_size, options.seed)
        return make_batch([self.learned[index] for index in chosen], self.pad_id)


def run_steps(
    training: Training,
    examples: Examples,
    rhythm: Rhythm,
    *,
    listener: Listener,
    save: Callable[[], None],
    stopping: Stopping,
) -> None:
    """Takes the steps that are left. However it ends, by an error or an interrupt too, the last whole step is saved.

    Only between steps does anything change, and there nobody interrupts: a step that was given up half-way is taken
    again from its beginning when training goes on.
    """
    num_steps = training.options.num_steps
    saved_step = training.step
    try:
        if training.step == 0:
            listener.on_validation(0, training.validate(examples.held_out))
        while training.step < num_steps:
            report = _take_step(training, examples.batch_of_step(training), stopping)
            listener.on_step(report)
            if report.step % rhythm.save_every == 0:
                with stopping.held():
                    save()
                    saved_step = report.step
            if report.step % rhythm.validate_every == 0 and report.step < num_steps:
                listener.on_validation(report.step, training.validate(examples.held_out))
        listener.on_validation(training.step, training.validate(examples.held_out))
    finally:
        if training.step != saved_step:
            with stopping.held():
                save()


def _take_step(training: Training, batch: Batch, stopping: Stopping) -> StepReport:
    started_at_s = perf_counter()
    loss = training.compute_gradients(batch)
    with stopping.held():
        training.update()
    return StepReport(training.step, loss, batch.num_tokens, perf_counter() - started_at_s)
