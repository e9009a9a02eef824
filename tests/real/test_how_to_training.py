"""The examples of `docs/how-to-training.md` run as they stand, against a swarm of two server processes."""

import re
from pathlib import Path
from typing import Any

import pytest
from doc_pages import run_examples

from p2pswarm.client.portal import Portal
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = save_tiny_checkpoint(tmp_path / "tiny-llama", "llama", eos_token_id=None)
    save_tiny_tokenizer(folder)
    with Portal() as portal:
        servers = portal.enter(local_swarm(LocalSwarmPlan(str(folder), (Span(0, 3), Span(3, 8)), threads=1))).value
        run_examples("how-to-training.md", str(folder), list(servers[0].addresses))
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d: loss ([\d.]+)", printed)]
    assert losses[2] < losses[0]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-2", "checkpoint-4"}
