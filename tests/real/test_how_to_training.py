"""The examples of `docs/how-to-training.md` run as they stand, against a swarm of two server processes."""

import re
from pathlib import Path

import pytest
from doc_pages import run_examples
from tiny_servers import TinyServers

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_every_example_runs(
    tiny_servers: TinyServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    run_examples("how-to-training.md", tiny_servers.model, list(tiny_servers.peers))
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d: loss ([\d.]+)", printed)]
    assert losses[2] < losses[0]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-2", "checkpoint-4"}
