"""The losses of a training, a JSON object a line beside what it saves: for plots, and for comparing trainings."""

import json
from pathlib import Path
from typing import Any

from p2pswarm.core.errors import ConfigError
from swarm_cli.finetuning.loop import StepReport
from swarm_cli.finetuning.training import Validation

FILE_NAME = "losses.jsonl"


class Journal:
    """Is written line by line; what was written of steps after `last_step` is dropped first, since they come again."""

    def __init__(self, folder: Path, last_step: int) -> None:
        """Raises `ConfigError` where the file cannot be read as one."""
        self._path = folder / FILE_NAME
        self.entries = [entry for entry in read_journal(self._path) if entry["step"] <= last_step]
        folder.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(map(_line, self.entries)))

    def on_step(self, report: StepReport) -> None:
        self._append(
            {
                "step": report.step,
                "loss": report.loss,
                "tokens": report.num_tokens,
                "seconds": round(report.duration_s, 4),
            }
        )

    def on_validation(self, step: int, validation: Validation) -> None:
        self._append({"step": step, "validation": validation.as_json()})

    def _append(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        with self._path.open("a") as file:
            file.write(_line(entry))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Its entries; none where there is no file."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; remove it") from error


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
