"""How a training goes, for people: a bar on a terminal, a line now and then elsewhere."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from swarm_cli.finetuning.loop import StepReport
from swarm_cli.finetuning.training import Validation

STEPS_OF_SPEED = 10
"""Tokens/s are those of the last steps."""
LINES_IN_ALL = 20
"""Where there is no terminal: about so many, over all steps."""


class Display:
    """Made by `display`."""

    def __init__(self, console: Console, bar: Progress, first_step: int, num_steps: int) -> None:
        self._console = console
        self._bar = bar
        self._num_steps = num_steps
        self._recent: deque[StepReport] = deque(maxlen=STEPS_OF_SPEED)
        self._task = bar.add_task("", total=num_steps, completed=first_step, state="")

    def on_step(self, report: StepReport) -> None:
        self._recent.append(report)
        state = f"loss {report.loss:.3f}  {self.tokens_per_s:.1f} tokens/s"
        self._bar.update(self._task, completed=report.step, state=state)
        if not self._console.is_terminal and report.step % max(1, self._num_steps // LINES_IN_ALL) == 0:
            self._console.print(f"step {report.step} of {self._num_steps}: {state}")

    def on_validation(self, step: int, validation: Validation) -> None:
        self._console.print(f"held-out rows after {step} steps: {in_words(validation)}")

    @property
    def tokens_per_s(self) -> float:
        """Of the last steps; 0 before the first."""
        duration_s = sum(report.duration_s for report in self._recent)
        return sum(report.num_tokens for report in self._recent) / duration_s if duration_s else 0.0


def in_words(validation: Validation) -> str:
    accuracy = "" if validation.accuracy is None else f", {validation.accuracy:.1%} right"
    return f"loss {validation.loss:.3f}{accuracy}"


@contextmanager
def display(console: Console, first_step: int, num_steps: int) -> Iterator[Display]:
    """Within, the bar is there."""
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield Display(console, bar, first_step, num_steps)
