"""The `swarm` command as users run it: a process of its own, over server processes with a tiny model."""

import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from tiny_servers import TIMEOUT_S, TinyServers, run_swarm, start_swarm

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.net.identity import Identity
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPT = "w5 w17 w99"
PROMPT_IDS = [5, 17, 99]


def text_of(token_ids: list[int]) -> str:
    """As the tiny tokenizer decodes; the first three are special."""
    return " ".join(f"w{token_id}" for token_id in token_ids if token_id > 2)


def generate(servers: TinyServers, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return servers.run("generate", servers.model, *arguments, stdin=stdin)


def local_tokens(servers: TinyServers, num_tokens: int, seed: int | None = None, **options: object) -> list[int]:
    local = load_local_model(open_checkpoint(servers.model))
    if seed is not None:
        torch.manual_seed(seed)
    sequences = local.generate(torch.tensor([PROMPT_IDS]), max_new_tokens=num_tokens, **options)
    return sequences[0, len(PROMPT_IDS) :].tolist()


def test_generate_writes_text_on_stdout_and_route_and_speed_on_stderr(tiny_servers: TinyServers) -> None:
    done = generate(tiny_servers, PROMPT, "--max-new-tokens", "6", "--temperature", "0")
    expected = local_tokens(tiny_servers, 6, do_sample=False)
    assert (done.returncode, done.stdout) == (0, text_of(expected) + "\n")
    route, speed = done.stderr.splitlines()
    assert route == "route 0:3 local-0-3 → 3:8 local-3-8"
    assert speed.startswith("speed ")
    assert speed.endswith(" s, 6 tokens")


def test_generate_json_is_one_object_and_nothing_else(tiny_servers: TinyServers) -> None:
    done = generate(tiny_servers, PROMPT, "--max-new-tokens", "6", "--json")
    printed = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert printed["token_ids"] == local_tokens(tiny_servers, 6)
    assert printed["text"] == text_of(printed["token_ids"])
    assert [(hop["start"], hop["end"]) for hop in printed["route"]] == [(0, 3), (3, 8)]
    assert 0 < printed["time_to_first_token_s"] < printed["total_s"]
    assert printed["tokens_per_s"] > 0


def test_seed_makes_sampling_the_local_models(tiny_servers: TinyServers) -> None:
    done = generate(tiny_servers, PROMPT, "--max-new-tokens", "6", "--temperature", "1.5", "--seed", "7", "--json")
    assert json.loads(done.stdout)["token_ids"] == local_tokens(
        tiny_servers, 6, seed=7, do_sample=True, temperature=1.5
    )


def test_blocks_are_kept_here_where_it_is_asked_for(tiny_servers: TinyServers) -> None:
    printed = json.loads(
        generate(tiny_servers, PROMPT, "--max-new-tokens", "6", "--local-blocks", "2", "--json").stdout
    )
    assert printed["token_ids"] == local_tokens(tiny_servers, 6)
    assert [(hop["start"], hop["end"]) for hop in printed["route"]] == [(2, 3), (3, 6)]
    refused = generate(tiny_servers, PROMPT, "--local-blocks", "4")
    assert refused.returncode == 1
    assert "local_blocks 4 are kept of each end of a model, and leave nothing of the 8 blocks" in refused.stderr


def test_prompt_comes_from_stdin_where_none_is_given(tiny_servers: TinyServers) -> None:
    done = generate(tiny_servers, "--max-new-tokens", "3", "--json", stdin=PROMPT)
    assert json.loads(done.stdout)["token_ids"] == local_tokens(tiny_servers, 3)


def test_swarm_is_found_again_without_an_address(tiny_servers: TinyServers, tmp_path: Path) -> None:
    generate(replace(tiny_servers, home=tmp_path), PROMPT, "--max-new-tokens", "1")
    words = ["generate", tiny_servers.model, PROMPT, "--max-new-tokens", "2", "--json"]
    done = run_swarm(*words, *tiny_servers.key_flags, home=tmp_path)
    assert json.loads(done.stdout)["token_ids"] == local_tokens(tiny_servers, 2)


def test_reader_who_leaves_ends_the_command_quietly(tiny_servers: TinyServers) -> None:
    with tiny_servers.start("generate", tiny_servers.model, PROMPT, "--max-new-tokens", "190") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(3)
        process.stdout.close()
        assert process.wait(TIMEOUT_S) == 141
        assert process.stderr.read() == ""


def test_status_shows_models_servers_and_coverage(tiny_servers: TinyServers) -> None:
    printed = json.loads(tiny_servers.run("status", "--json").stdout)
    (model,) = printed["models"]
    assert model["model_id"].startswith("tiny-llama@")
    assert (model["num_blocks"], model["uncovered"]) == (8, [])
    assert [(s["start"], s["end"], s["state"], s["name"]) for s in model["servers"]] == [
        (0, 3, "online", "local-0-3"),
        (3, 8, "online", "local-3-8"),
    ]
    table = tiny_servers.run("status", "tiny-llama")
    assert table.returncode == 0
    assert "8 blocks, all served" in table.stdout
    detailed = json.loads(tiny_servers.run("status", "--details", "--json").stdout)
    assert all(server["load"]["cache_tokens_total"] > 0 for server in detailed["models"][0]["servers"])


def test_route_shows_the_chain_that_generate_would_use(tiny_servers: TinyServers) -> None:
    printed = json.loads(tiny_servers.run("route", "tiny-llama", "--json").stdout)
    assert [(hop["name"], hop["start"], hop["end"]) for hop in printed["route"]] == [
        ("local-0-3", 0, 3),
        ("local-3-8", 3, 8),
    ]
    assert len(printed["round_trips_s"]) == 2
    assert sum(edge["cost_us"] for edge in printed["edges"]) == printed["cost_us"]
    assert printed["turned_down"] == []
    told = tiny_servers.run("route", "tiny-llama", "--max-length", "100")
    assert (told.returncode, told.stderr) == (0, "")
    assert "local-0-3 runs 0:3" in told.stdout
    refused = tiny_servers.run("route", "tiny-llama", "--max-length", "100000")
    assert refused.returncode == 1
    assert "100000 are wanted" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["status", "other"], "no model other in this swarm; announced are tiny-llama@"),
        (["status", "--peers", "nonsense"], "nonsense"),
        (["generate", "/nowhere", "hi"], "/nowhere"),
        (["generate", "FOLDER", " "], "the prompt is empty"),
        (["generate", "FOLDER", "w5", "--chat"], "has no chat template"),
    ],
)
def test_errors_are_one_clear_line(tiny_servers: TinyServers, arguments: list[str], complaint: str) -> None:
    done = tiny_servers.run(*(tiny_servers.model if word == "FOLDER" else word for word in arguments))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("swarm: error: ")
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_peer_that_does_not_answer_is_named_with_what_to_do(tiny_servers: TinyServers, tmp_path: Path) -> None:
    dead = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
    done = generate(replace(tiny_servers, peers=(dead,), home=tmp_path), PROMPT)
    assert done.returncode == 1
    error, advice = done.stderr.splitlines()
    assert dead in error
    assert "--peers" in advice


def test_model_that_nobody_serves_is_named_with_what_there_is(tiny_servers: TinyServers, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "lonely", "llama", seed=1)
    save_tiny_tokenizer(folder)
    done = tiny_servers.run("generate", str(folder), PROMPT)
    assert done.returncode == 1
    assert "nobody serves lonely@" in done.stderr
    assert "announced are tiny-llama@" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_demo_leaves_no_servers_behind_when_it_is_ended(tiny_servers: TinyServers, number: signal.Signals) -> None:
    words = ["demo", PROMPT, "--model", tiny_servers.model, "--max-new-tokens", "200"]
    with start_swarm(*words, home=tiny_servers.home) as process:
        assert process.stderr is not None
        assert "Starting 3 servers" in process.stderr.readline()
        assert "ready" in process.stderr.readline()
        servers = psutil.Process(process.pid).children(recursive=True)
        assert servers
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == (-number if number == signal.SIGKILL else 128 + number)
        assert "Traceback" not in process.stderr.read()
    gone, alive = psutil.wait_procs(servers, timeout=20)
    assert not alive
    assert gone


def test_demo_writes_text_verifies_it_and_ends_with_status_0(tiny_servers: TinyServers) -> None:
    words = ["demo", PROMPT, "--model", tiny_servers.model, "--max-new-tokens", "8", "--verify"]
    done = run_swarm(*words, home=tiny_servers.home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(PROMPT)
    assert "verified the local model gives the same 8 tokens" in done.stderr
    assert done.stderr.count("ready") == 3
    assert len(done.stderr.splitlines()) < 12


def test_demo_whose_servers_fail_shows_why(tiny_servers: TinyServers, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "broken", "llama")
    save_tiny_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(b"not weights at all")
    done = run_swarm("demo", PROMPT, "--model", str(folder), home=tmp_path)
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupted_generation_ends_with_status_130(tiny_servers: TinyServers) -> None:
    with tiny_servers.start("generate", tiny_servers.model, PROMPT, "--max-new-tokens", "190") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(3)
        started_at_s = time.perf_counter()
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 130
        assert time.perf_counter() - started_at_s < 10
        assert process.stderr.read() == ""
