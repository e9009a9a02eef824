"""`swarm finetune` as users run it: a process of its own, over server processes with a tiny model."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from p2pswarm.client.portal import Portal
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPT = "w5 w6"
TIMEOUT_S = 120


@dataclass(frozen=True)
class World:
    model: str
    address: str
    home: Path

    def command(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "swarm_cli", name, self.model, *arguments, "--peers", self.address]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"XDG_CACHE_HOME": str(self.home), "OMP_NUM_THREADS": "1"}

    def run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(name, *arguments),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env=self.environment,
        )

    def generate(self, *arguments: str) -> list[int]:
        done = self.run("generate", PROMPT, *arguments, "--max-new-tokens", "4", "--json")
        assert done.returncode == 0, done.stderr
        token_ids: list[int] = json.loads(done.stdout)["token_ids"]
        return token_ids

    def finetune(self, rows: Path, output: Path, *arguments: str) -> dict[str, Any]:
        done = self.run("finetune", *training_flags(rows, output), *arguments, "--json")
        assert done.returncode == 0, done.stderr
        printed: dict[str, Any] = json.loads(done.stdout)
        assert printed["output"] == str(output)
        return printed


def training_flags(rows: Path, output: Path) -> list[str]:
    return ["--data", str(rows), "--output", str(output), "--batch-size", "4", "--held-out", "0.2"]


def losses(output: Path) -> dict[int, float]:
    entries = map(json.loads, (output / "losses.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def write_rows(path: Path, *fields: str) -> Path:
    """Texts of four words that recur, so that there is something to learn; a label says whether one of them is in."""
    drawn = random.Random(0)
    with path.open("w") as file:
        for number in range(25):
            words = drawn.choices(("w5", "w6", "w7", "w8"), k=drawn.randrange(3, 9))
            row = {name: " ".join(words) for name in fields}
            if "label" in row:
                row |= {"label": number % 2, "text": f"{row['text']} {'w90' if number % 2 else 'w91'}"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("home")
    folder = save_tiny_checkpoint(home / "tiny-llama", "llama", eos_token_id=None)
    save_tiny_tokenizer(folder)
    with Portal() as portal:
        plan = LocalSwarmPlan(str(folder), (Span(0, 3), Span(3, 8)), threads=1)
        servers = portal.enter(local_swarm(plan)).value
        yield World(str(folder), servers[0].addresses[0], home)


@pytest.fixture(scope="module")
def plain_token_ids(world: World) -> list[int]:
    """What the model writes without being tuned."""
    return world.generate()


@pytest.mark.parametrize("method", ["ptune", "deep_ptune", "lora"])
def test_tuned_model_writes_what_it_was_tuned_on(
    world: World, plain_token_ids: list[int], tmp_path: Path, method: str
) -> None:
    rows, output = write_rows(tmp_path / "rows.jsonl", "prompt", "completion"), tmp_path / "tuned"
    result = world.finetune(rows, output, "--method", method, "--steps", "12", "--learning-rate", "0.03")
    assert result["steps"] == 12
    assert result["validation"]["loss"] < result["validation_before"]["loss"]
    assert world.generate("--adapter", str(output)) != plain_token_ids


def test_classifier_learns_its_labels_and_names_them(world: World, tmp_path: Path) -> None:
    rows, output = write_rows(tmp_path / "rows.jsonl", "text", "label"), tmp_path / "tuned"
    result = world.finetune(rows, output, "--method", "ptune", "--steps", "20", "--prompt-length", "2")
    assert result["validation"]["accuracy"] >= 0.8
    assert json.loads((output / "labels.json").read_text()) == ["0", "1"]


def test_interrupted_training_goes_on_with_the_losses_of_one_that_was_not(world: World, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "text")
    options = ("--method", "lora", "--steps", "12", "--validate-every", "100", "--save-every", "100")
    world.finetune(rows, tmp_path / "whole", *options)
    flags = [*training_flags(rows, tmp_path / "stopped"), *options]
    with subprocess.Popen(
        world.command("finetune", *flags), stderr=subprocess.PIPE, text=True, env=world.environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 3 of 12"):
                break
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(TIMEOUT_S) == 130
    assert "the same command with --resume goes on" in said
    assert "Traceback" not in said
    stopped_after = max(losses(tmp_path / "stopped"))
    assert 3 <= stopped_after < 12

    again = world.run("finetune", *flags)
    assert again.returncode == 1
    assert "holds a training already: go on with --resume" in again.stderr
    other = world.run("finetune", *flags, "--resume", "--seed", "4")
    assert other.returncode == 1
    assert "seed was 0, now 4" in other.stderr

    world.finetune(rows, tmp_path / "stopped", *options, "--resume")
    # The parts of a batch come back in any order, and so their gradients are added: float32 rounds otherwise each time.
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_bad_rows_are_told_before_anything_is_loaded(world: World, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "text")
    with rows.open("a") as file:
        file.write('{"txt": "w5"}\n')
    done = world.run("finetune", *training_flags(rows, tmp_path / "tuned"), "--method", "lora")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"swarm: error: {rows}:26: wanted ")
    assert not (tmp_path / "tuned").exists()
