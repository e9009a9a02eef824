"""`swarm bench` as users run it, every measurement once, over server processes with a tiny model."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from p2pswarm.client.portal import Portal
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm

pytestmark = [pytest.mark.real, pytest.mark.slow]

TIMEOUT_S = 180


@dataclass(frozen=True)
class World:
    folder: str
    address: str

    def bench(self, *flags: str, peers: bool = True) -> dict[str, Any]:
        command = [sys.executable, "-m", "swarm_cli", "bench", "--model", self.folder, "--rounds", "1", "--json"]
        where = ["--peers", self.address] if peers else ["--servers", "2"]
        done = subprocess.run(
            [*command, *where, *flags], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stderr
        printed: dict[str, Any] = json.loads(done.stdout)
        assert (printed["model"], len(printed["route"]), printed["rounds"]) == ("tiny-llama", 2, 1)
        return printed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("bench") / "tiny-llama", "llama", eos_token_id=None)
    save_tiny_tokenizer(folder)
    with Portal() as portal:
        plan = LocalSwarmPlan(str(folder), (Span(0, 3), Span(3, 8)), threads=1)
        servers = portal.enter(local_swarm(plan)).value
        yield World(str(folder), servers[0].addresses[0])


def test_one_client_is_measured_over_servers_of_its_own(world: World) -> None:
    printed = world.bench("--new-tokens", "4", "--prompt-tokens", "20", peers=False)
    assert printed["is_exact"] is True
    assert min(printed["local_tokens_per_s"], printed["swarm_tokens_per_s"], printed["swarm_first_token_s"]) > 0


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ([], "sessions of one process"),
        pytest.param(["--client-processes"], "processes", marks=pytest.mark.exhaustive),
    ],
)
def test_clients_get_their_own_tokens_all_at_once(world: World, flags: list[str], kind: str) -> None:
    printed = world.bench("--clients", "3", "--new-tokens", "6", *flags)
    assert printed["clients_are"] == kind
    assert [entry["num_clients"] for entry in printed["clients"]] == [1, 3]
    assert [entry["are_exact"] for entry in printed["clients"]] == [[True], [True] * 3]
    assert printed["clients"][0]["over_one_client"] == 1.0


@pytest.mark.exhaustive
def test_stall_by_a_long_prompt_is_measured(world: World) -> None:
    printed = world.bench("--stall", "--prompt-tokens", "150", "--new-tokens", "10")
    assert printed["is_exact"] is True
    assert printed["quiet_s"]["count"] >= 9
    assert printed["stalled_s"]["count"] >= 1
    assert printed["over_quiet_median"]["max"] >= printed["over_quiet_median"]["median"]


@pytest.mark.exhaustive
def test_greedy_peer_is_measured(world: World) -> None:
    printed = world.bench("--greedy", "--new-tokens", "20")
    assert printed["is_exact"] is True
    assert printed["greedy_tokens_per_s"] > 0
    assert printed["share_kept"] > 0


@pytest.mark.exhaustive
def test_offloaded_blocks_are_read_from_the_disk_for_each_token(world: World) -> None:
    printed = world.bench("--baseline", "offload", "--new-tokens", "4")
    assert printed["is_exact"] is True
    assert printed["read_bytes_per_token"] >= 0.9 * printed["blocks_bytes"] > 0
    assert printed["offload_tokens_per_s"] < printed["local_tokens_per_s"]


def test_training_is_measured_beside_the_local_model(world: World) -> None:
    printed = world.bench("--training", "--batch", "2x12")
    assert printed["batch"] == [2, 12]
    assert printed["are_equal"] is True
    assert min(printed["forward_ratio"], printed["forward_backward_ratio"]) > 0
