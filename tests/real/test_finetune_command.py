"""`swarm finetune` as users run it: a process of its own, over server processes with a tiny model."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_servers import TIMEOUT_S, TinyServers

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPT = "w5 w6"


def generate(servers: TinyServers, *arguments: str) -> list[int]:
    done = servers.run("generate", servers.model, PROMPT, *arguments, "--max-new-tokens", "4", "--json")
    assert done.returncode == 0, done.stderr
    token_ids: list[int] = json.loads(done.stdout)["token_ids"]
    return token_ids


def finetune(servers: TinyServers, rows: Path, output: Path, *arguments: str) -> dict[str, Any]:
    done = servers.run("finetune", servers.model, *training_flags(rows, output), *arguments, "--json")
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
def plain_token_ids(tiny_servers: TinyServers) -> list[int]:
    """What the model writes without being tuned."""
    return generate(tiny_servers)


@pytest.mark.parametrize(
    "method", [*(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("ptune", "deep_ptune")), "lora"]
)
def test_tuned_model_writes_what_it_was_tuned_on(
    tiny_servers: TinyServers, plain_token_ids: list[int], tmp_path: Path, method: str
) -> None:
    rows, output = write_rows(tmp_path / "rows.jsonl", "prompt", "completion"), tmp_path / "tuned"
    result = finetune(tiny_servers, rows, output, "--method", method, "--steps", "12", "--learning-rate", "0.03")
    assert result["steps"] == 12
    assert result["validation"]["loss"] < result["validation_before"]["loss"]
    assert generate(tiny_servers, "--adapter", str(output)) != plain_token_ids


def test_classifier_learns_its_labels_and_names_them(tiny_servers: TinyServers, tmp_path: Path) -> None:
    rows, output = write_rows(tmp_path / "rows.jsonl", "text", "label"), tmp_path / "tuned"
    result = finetune(tiny_servers, rows, output, "--method", "ptune", "--steps", "20", "--prompt-length", "2")
    assert result["validation"]["accuracy"] >= 0.8
    assert json.loads((output / "labels.json").read_text()) == ["0", "1"]


def test_interrupted_training_goes_on_with_the_losses_of_one_that_was_not(
    tiny_servers: TinyServers, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "text")
    options = ("--method", "lora", "--steps", "12", "--validate-every", "100", "--save-every", "100")
    finetune(tiny_servers, rows, tmp_path / "whole", *options)
    flags = [*training_flags(rows, tmp_path / "stopped"), *options]
    with tiny_servers.start("finetune", tiny_servers.model, *flags) as process:
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

    again = tiny_servers.run("finetune", tiny_servers.model, *flags)
    assert again.returncode == 1
    assert "holds a training already: go on with --resume" in again.stderr
    other = tiny_servers.run("finetune", tiny_servers.model, *flags, "--resume", "--seed", "4")
    assert other.returncode == 1
    assert "seed was 0, now 4" in other.stderr

    finetune(tiny_servers, rows, tmp_path / "stopped", *options, "--resume")
    # The parts of a batch come back in any order, and so their gradients are added: float32 rounds otherwise each time.
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_bad_rows_are_told_before_anything_is_loaded(tiny_servers: TinyServers, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "text")
    with rows.open("a") as file:
        file.write('{"txt": "w5"}\n')
    done = tiny_servers.run(
        "finetune", tiny_servers.model, *training_flags(rows, tmp_path / "tuned"), "--method", "lora"
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"swarm: error: {rows}:26: wanted ")
    assert not (tmp_path / "tuned").exists()
