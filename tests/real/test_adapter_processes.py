"""Adapters from the command line to the tokens: two `swarmd` processes, one of which has one, and `swarm`."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_adapters import save_adapter, with_adapter
from tiny_servers import run_swarm

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPT, PROMPT_IDS = "w5 w17 w99", [5, 17, 99]


@contextmanager
def swarmd(model: Path, identity: Path, *more: str) -> Iterator[dict[str, Any]]:
    """A server, and what it says when it is ready."""
    flags = ["--host", "127.0.0.1", "--threads", "1", "--json", "--identity", str(identity)]
    command = [sys.executable, "-m", "swarmd", "start", str(model), *flags, *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            events = (json.loads(line) for line in process.stdout)
            yield next(event for event in events if event["event"] == "ready")
        finally:
            process.kill()


def test_a_client_picks_an_adapter_and_gets_pefts_tokens(tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "tiny", "llama", eos_token_id=None)
    save_tiny_tokenizer(model)
    local = load_local_model(open_checkpoint(str(model)))
    adapter = save_adapter(tmp_path / "poet", local, seed=1)
    merged = with_adapter(local, adapter)

    def tokens(reference: Any) -> list[int]:
        output = reference.generate(torch.tensor([PROMPT_IDS]), max_new_tokens=8, do_sample=False)
        return list(output[0, len(PROMPT_IDS) :].tolist())

    def swarm(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_swarm(command, *arguments, "--json", "--peers", *ready["addresses"], home=tmp_path / "cache")

    def generated(*more: str) -> dict[str, Any]:
        done = swarm("generate", str(model), PROMPT, "--max-new-tokens", "8", "--temperature", "0", *more)
        assert done.returncode == 0, done.stderr
        printed: dict[str, Any] = json.loads(done.stdout)
        return printed

    with (
        swarmd(model, tmp_path / "a.key", "--adapters", str(adapter)) as ready,
        swarmd(model, tmp_path / "b.key", "--peers", *ready["addresses"]) as plain,
    ):
        (adapter_id,) = ready["adapters"]
        assert plain["adapters"] == []
        assert generated()["token_ids"] == tokens(local)
        with_poet = generated("--adapter", "poet")
        assert with_poet["token_ids"] == tokens(merged) != tokens(local)
        assert [hop["peer_id"] for hop in with_poet["route"]] == [ready["peer_id"]]
        route = json.loads(swarm("route", ready["model_id"], "--adapter", "poet").stdout)
        assert {one["peer_id"]: one["why"] for one in route["turned_down"]} == {
            plain["peer_id"]: f"does not have the adapter {adapter_id}"
        }
        refused = swarm("generate", str(model), PROMPT, "--adapter", "bard")
        assert refused.returncode == 1
        assert f"no server announces the adapter bard; announced are {adapter_id}" in refused.stderr
