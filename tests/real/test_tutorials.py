"""The tutorials run as they stand, with a real model over server processes, and reach what they promise."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from doc_pages import DOCS, run_examples

from p2pswarm.checkpoint.cache_directory import CACHE_VARIABLE, cache_directory
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.client.portal import Portal
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm, split_evenly
from swarm_cli.sample_model import sample_model

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

TIMEOUT_S = 500
"""For a command; on two quiet cores the longest takes one minute."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A node of a swarm of SmolLM2, a thread a server: the parts of a batch are at both of them at the same time."""
    model = sample_model()
    with Portal() as portal:
        plan = LocalSwarmPlan(model, split_evenly(open_checkpoint(model).num_blocks, 2), threads=1)
        yield portal.enter(local_swarm(plan)).value[0].addresses[0]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the pages find their data, and may write. The model's weights need not be converted again."""
    (tmp_path / "docs").symlink_to(DOCS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(cache_directory()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def tell(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Shows it to whoever runs the tests: the figures are what the pages are about."""
    with capsys.disabled():
        sys.stdout.write(text)


def test_classifier_goes_from_chance_to_85_percent_on_rows_it_has_not_seen(
    address: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        world = run_examples("tutorial-classifier.md", sample_model(), [address])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    tell(capsys, f"\ntutorial-classifier.md:\n{printed}")
    assert 0.35 <= world["before"] <= 0.65
    assert world["after"] >= 0.85
    assert sum(path.stat().st_size for path in (workplace / "sentiment").iterdir()) < 200_000


@pytest.mark.exhaustive
def test_style_is_learned_and_held_out_rows_are_less_of_a_surprise(
    address: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = DOCS / "tutorial-style.md"
    commands = re.findall(r"^\$ (.*)$", page.read_text(), re.MULTILINE)
    environment = os.environ | {
        "MODEL": sample_model(),
        "PEERS": address,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    outputs = []
    tell(capsys, f"\n{page.name}:\n")
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        tell(capsys, f"$ {command}\n{done.stdout}{done.stderr}")
        assert done.returncode == 0
        outputs.append(done.stdout)
    result = json.loads((workplace / "result.json").read_text())
    assert result["validation"]["loss"] <= 0.8 * result["validation_before"]["loss"]
    before, after = outputs[2], outputs[-1]
    assert " STOP" not in before
    assert " STOP" in after
