"""The examples of `docs/how-to-python.md` run as they stand, against a swarm of two server processes."""

from pathlib import Path

import pytest
from doc_pages import run_examples

from p2pswarm.client.portal import Portal
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_tiny_checkpoint(tmp_path / "tiny-llama", "llama", eos_token_id=None)
    save_tiny_tokenizer(folder)
    with Portal() as portal:
        servers = portal.enter(local_swarm(LocalSwarmPlan(str(folder), (Span(0, 3), Span(3, 8)), threads=1))).value
        world = run_examples("how-to-python.md", str(folder), list(servers[0].addresses))
    printed = capsys.readouterr().out
    assert "tokens in the servers' caches, 0:3 …" in printed
    assert world["logits"].shape == (1, 4, 128)
