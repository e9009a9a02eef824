"""A server process with quantized weights: announced, used by who does not mind, avoided by who wants exact tokens."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from p2pswarm.client.portal import Portal
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm

pytestmark = pytest.mark.real

TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The model's folder, and an address to join by."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", eos_token_id=None)
    save_tiny_tokenizer(folder)
    with Portal() as portal:
        plan = LocalSwarmPlan(str(folder), (Span(0, 8),), threads=1, quantization=Quantization.NF4)
        servers = portal.enter(local_swarm(plan)).value
        yield str(folder), servers[0].addresses[0]


def swarm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swarm_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)


def test_status_shows_how_a_server_holds_its_weights(world: tuple[str, str]) -> None:
    (model,) = json.loads(swarm("status", "--peers", world[1], "--json").stdout)["models"]
    assert [server["quantization"] for server in model["servers"]] == ["nf4"]


def test_a_quantized_model_writes_text(world: tuple[str, str]) -> None:
    folder, address = world
    done = swarm("generate", folder, "w5 w17", "--max-new-tokens", "5", "--json", "--peers", address)
    assert len(json.loads(done.stdout)["token_ids"]) == 5


def test_who_wants_the_exact_tokens_is_told_that_there_is_no_such_server(world: tuple[str, str]) -> None:
    folder, address = world
    done = swarm("generate", folder, "w5 w17", "--exact", "--peers", address)
    assert done.returncode == 1
    assert "no server for blocks 0:8" in done.stderr
    assert "its weights are held as nf4" in done.stderr
