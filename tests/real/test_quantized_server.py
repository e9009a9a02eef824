"""A server process with quantized weights: announced, used by who does not mind, avoided by who wants exact tokens."""

import json
from collections.abc import Iterator

import pytest
from tiny_servers import TinyServers

from p2pswarm.client.portal import Portal
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def quantized_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServers]:
    home = tmp_path_factory.mktemp("quantized")
    folder = save_tiny_checkpoint(home / "tiny-llama", "llama", eos_token_id=None)
    save_tiny_tokenizer(folder)
    with Portal() as portal:
        plan = LocalSwarmPlan(str(folder), (Span(0, 8),), threads=1, quantization=Quantization.NF4)
        servers = portal.enter(local_swarm(plan)).value
        yield TinyServers(str(folder), servers[0].addresses, home)


def test_status_shows_how_a_server_holds_its_weights(quantized_server: TinyServers) -> None:
    (model,) = json.loads(quantized_server.run("status", "--json").stdout)["models"]
    assert [server["quantization"] for server in model["servers"]] == ["nf4"]


def test_a_quantized_model_writes_text(quantized_server: TinyServers) -> None:
    words = ["generate", quantized_server.model, "w5 w17", "--max-new-tokens", "5", "--json"]
    done = quantized_server.run(*words)
    assert len(json.loads(done.stdout)["token_ids"]) == 5


def test_who_wants_the_exact_tokens_is_told_that_there_is_no_such_server(quantized_server: TinyServers) -> None:
    done = quantized_server.run("generate", quantized_server.model, "w5 w17", "--exact")
    assert done.returncode == 1
    assert "no server for blocks 0:8" in done.stderr
    assert "its weights are held as nf4" in done.stderr
