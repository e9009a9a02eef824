"""The examples of `docs/how-to-python.md` run as they stand, against a swarm of two server processes."""

from pathlib import Path

import pytest
from doc_pages import run_examples
from tiny_servers import TinyServers

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_every_example_runs(
    tiny_servers: TinyServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    world = run_examples("how-to-python.md", tiny_servers.model, list(tiny_servers.peers))
    printed = capsys.readouterr().out
    assert "tokens in the servers' caches, 0:3 …" in printed
    assert world["logits"].shape == (1, 4, 128)
