"""`swarm bench` as users run it, every measurement once, over server processes with a tiny model."""

import json
import subprocess
from typing import Any

import pytest
from tiny_servers import TinyServers, run_swarm

pytestmark = [pytest.mark.real, pytest.mark.slow]


def flags_of(servers: TinyServers, *flags: str) -> list[str]:
    return ["bench", "--model", servers.model, "--rounds", "1", "--json", *flags]


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    assert (printed["model"], len(printed["route"]), printed["rounds"]) == ("tiny-llama", 2, 1)
    return printed


def bench(servers: TinyServers, *flags: str) -> dict[str, Any]:
    """Over servers that run already."""
    return result(servers.run(*flags_of(servers, *flags)))


def test_one_client_is_measured_over_servers_of_its_own(tiny_servers: TinyServers) -> None:
    flags = flags_of(tiny_servers, "--servers", "2", "--new-tokens", "4", "--prompt-tokens", "20")
    printed = result(run_swarm(*flags, home=tiny_servers.home))
    assert printed["is_exact"] is True
    assert min(printed["local_tokens_per_s"], printed["swarm_tokens_per_s"], printed["swarm_first_token_s"]) > 0


def test_a_client_that_keeps_blocks_is_measured(tiny_servers: TinyServers) -> None:
    flags = ("--local-blocks", "2", "--new-tokens", "4", "--prompt-tokens", "20")
    printed = bench(tiny_servers, *flags)
    assert (printed["is_exact"], printed["local_blocks"]) == (True, 2)
    assert [(hop["start"], hop["end"]) for hop in printed["route"]] == [(2, 3), (3, 6)]


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ([], "sessions of one process"),
        pytest.param(["--client-processes"], "processes", marks=pytest.mark.exhaustive),
    ],
)
def test_clients_get_their_own_tokens_all_at_once(tiny_servers: TinyServers, flags: list[str], kind: str) -> None:
    printed = bench(tiny_servers, "--clients", "3", "--new-tokens", "6", *flags)
    assert printed["clients_are"] == kind
    assert [entry["num_clients"] for entry in printed["clients"]] == [1, 3]
    assert [entry["are_exact"] for entry in printed["clients"]] == [[True], [True] * 3]
    assert printed["clients"][0]["over_one_client"] == 1.0


@pytest.mark.exhaustive
def test_stall_by_a_long_prompt_is_measured(tiny_servers: TinyServers) -> None:
    printed = bench(tiny_servers, "--stall", "--prompt-tokens", "150", "--new-tokens", "10")
    assert printed["is_exact"] is True
    assert printed["quiet_s"]["count"] >= 9
    assert printed["stalled_s"]["count"] >= 1
    assert printed["over_quiet_median"]["max"] >= printed["over_quiet_median"]["median"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("calls", ["forward", "backward"])
def test_greedy_peer_is_measured(tiny_servers: TinyServers, calls: str) -> None:
    printed = bench(tiny_servers, "--greedy", calls, "--new-tokens", "20")
    assert printed["is_exact"] is True
    assert printed["greedy_tokens_per_s"] > 0
    assert printed["share_kept"] > 0


@pytest.mark.exhaustive
def test_offloaded_blocks_are_read_from_the_disk_for_each_token(tiny_servers: TinyServers) -> None:
    printed = bench(tiny_servers, "--baseline", "offload", "--new-tokens", "4")
    assert printed["is_exact"] is True
    assert printed["read_bytes_per_token"] >= 0.9 * printed["blocks_bytes"] > 0
    assert printed["offload_tokens_per_s"] < printed["local_tokens_per_s"]


def test_training_is_measured_beside_the_local_model(tiny_servers: TinyServers) -> None:
    printed = bench(tiny_servers, "--training", "--batch", "2x12")
    assert printed["batch"] == [2, 12]
    assert printed["are_equal"] is True
    assert min(printed["forward_ratio"], printed["forward_backward_ratio"]) > 0
