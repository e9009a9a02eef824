"""The `swarm` command as users run it: a process of its own, over server processes with a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.portal import Portal
from p2pswarm.core.span import Span
from p2pswarm.net.identity import Identity
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPT = "w5 w17 w99"
PROMPT_IDS = [5, 17, 99]
TIMEOUT_S = 120


def text_of(token_ids: list[int]) -> str:
    """As the tiny tokenizer decodes; the first three are special."""
    return " ".join(f"w{token_id}" for token_id in token_ids if token_id > 2)


@dataclass(frozen=True)
class World:
    folder: str
    address: str
    home: Path

    def swarm(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "swarm_cli", *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env=self.environment,
            **({"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}),
        )

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"XDG_CACHE_HOME": str(self.home), "PYTHONWARNINGS": "error::ResourceWarning"}

    def generate(self, *arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
        return self.swarm("generate", self.folder, *arguments, "--peers", self.address, **options)

    def local_tokens(self, num_tokens: int, seed: int | None = None, **options: object) -> list[int]:
        local = load_local_model(open_checkpoint(self.folder))
        if seed is not None:
            torch.manual_seed(seed)
        sequences = local.generate(torch.tensor([PROMPT_IDS]), max_new_tokens=num_tokens, **options)
        return sequences[0, len(PROMPT_IDS) :].tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("home")
    folder = save_tiny_checkpoint(home / "tiny-llama", "llama", eos_token_id=None)
    save_tiny_tokenizer(folder)
    with Portal() as portal:
        plan = LocalSwarmPlan(str(folder), (Span(0, 3), Span(3, 8)), threads=1)
        servers = portal.enter(local_swarm(plan)).value
        yield World(str(folder), servers[0].addresses[0], home)


def test_generate_writes_text_on_stdout_and_route_and_speed_on_stderr(world: World) -> None:
    done = world.generate(PROMPT, "--max-new-tokens", "6", "--temperature", "0")
    expected = world.local_tokens(6, do_sample=False)
    assert (done.returncode, done.stdout) == (0, text_of(expected) + "\n")
    route, speed = done.stderr.splitlines()
    assert route == "route 0:3 local-0-3 → 3:8 local-3-8"
    assert speed.startswith("speed ")
    assert speed.endswith(" s, 6 tokens")


def test_generate_json_is_one_object_and_nothing_else(world: World) -> None:
    done = world.generate(PROMPT, "--max-new-tokens", "6", "--json")
    printed = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert printed["token_ids"] == world.local_tokens(6)
    assert printed["text"] == text_of(printed["token_ids"])
    assert [(hop["start"], hop["end"]) for hop in printed["route"]] == [(0, 3), (3, 8)]
    assert 0 < printed["time_to_first_token_s"] < printed["total_s"]
    assert printed["tokens_per_s"] > 0


def test_seed_makes_sampling_the_local_models(world: World) -> None:
    done = world.generate(PROMPT, "--max-new-tokens", "6", "--temperature", "1.5", "--seed", "7", "--json")
    assert json.loads(done.stdout)["token_ids"] == world.local_tokens(6, seed=7, do_sample=True, temperature=1.5)


def test_prompt_comes_from_stdin_where_none_is_given(world: World) -> None:
    done = world.generate("--max-new-tokens", "3", "--json", stdin=PROMPT)
    assert json.loads(done.stdout)["token_ids"] == world.local_tokens(3)


def test_swarm_is_found_again_without_an_address(world: World) -> None:
    world.generate(PROMPT, "--max-new-tokens", "1")
    done = world.swarm("generate", world.folder, PROMPT, "--max-new-tokens", "2", "--json")
    assert json.loads(done.stdout)["token_ids"] == world.local_tokens(2)


def test_reader_who_leaves_ends_the_command_quietly(world: World) -> None:
    command = [sys.executable, "-m", "swarm_cli", "generate", world.folder, PROMPT, "--peers", world.address]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "150"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=world.environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(3)
        process.stdout.close()
        assert process.wait(TIMEOUT_S) == 141
        assert process.stderr.read() == b""


def test_status_shows_models_servers_and_coverage(world: World) -> None:
    printed = json.loads(world.swarm("status", "--peers", world.address, "--json").stdout)
    (model,) = printed["models"]
    assert model["model_id"].startswith("tiny-llama@")
    assert (model["num_blocks"], model["uncovered"]) == (8, [])
    assert [(s["start"], s["end"], s["state"], s["name"]) for s in model["servers"]] == [
        (0, 3, "online", "local-0-3"),
        (3, 8, "online", "local-3-8"),
    ]
    table = world.swarm("status", "tiny-llama", "--peers", world.address)
    assert table.returncode == 0
    assert "8 blocks, all served" in table.stdout
    detailed = json.loads(world.swarm("status", "--details", "--peers", world.address, "--json").stdout)
    assert all(server["load"]["cache_tokens_total"] > 0 for server in detailed["models"][0]["servers"])


def test_route_shows_the_chain_that_generate_would_use(world: World) -> None:
    printed = json.loads(world.swarm("route", "tiny-llama", "--peers", world.address, "--json").stdout)
    assert [(hop["name"], hop["start"], hop["end"]) for hop in printed["route"]] == [
        ("local-0-3", 0, 3),
        ("local-3-8", 3, 8),
    ]
    assert len(printed["round_trips_s"]) == 2
    assert sum(edge["cost_us"] for edge in printed["edges"]) == printed["cost_us"]
    assert printed["turned_down"] == []
    told = world.swarm("route", "tiny-llama", "--peers", world.address, "--max-length", "100")
    assert (told.returncode, told.stderr) == (0, "")
    assert "local-0-3 runs 0:3" in told.stdout
    refused = world.swarm("route", "tiny-llama", "--peers", world.address, "--max-length", "100000")
    assert refused.returncode == 1
    assert "100000 are wanted" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["status", "other", "--peers", "ADDRESS"], "no model other in this swarm; announced are tiny-llama@"),
        (["status", "--peers", "nonsense"], "nonsense"),
        (["generate", "/nowhere", "hi", "--peers", "ADDRESS"], "/nowhere"),
        (["generate", "FOLDER", " ", "--peers", "ADDRESS"], "the prompt is empty"),
        (["generate", "FOLDER", "w5", "--chat", "--peers", "ADDRESS"], "has no chat template"),
    ],
)
def test_errors_are_one_clear_line(world: World, arguments: list[str], complaint: str) -> None:
    names = {"ADDRESS": world.address, "FOLDER": world.folder}
    done = world.swarm(*(names.get(argument, argument) for argument in arguments))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("swarm: error: ")
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_peer_that_does_not_answer_is_named_with_what_to_do(world: World, tmp_path: Path) -> None:
    dead = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
    newcomer = World(world.folder, dead, tmp_path)
    done = newcomer.generate(PROMPT)
    assert done.returncode == 1
    error, advice = done.stderr.splitlines()
    assert dead in error
    assert "--peers" in advice


def test_model_that_nobody_serves_is_named_with_what_there_is(world: World, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "lonely", "llama", seed=1)
    save_tiny_tokenizer(folder)
    done = world.swarm("generate", str(folder), PROMPT, "--peers", world.address)
    assert done.returncode == 1
    assert "nobody serves lonely@" in done.stderr
    assert "announced are tiny-llama@" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_demo_leaves_no_servers_behind_when_it_is_ended(world: World, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "swarm_cli", "demo", PROMPT, "--model", world.folder, "--max-new-tokens", "200"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=world.environment
    ) as process:
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


def test_demo_writes_text_verifies_it_and_ends_with_status_0(world: World) -> None:
    done = world.swarm("demo", PROMPT, "--model", world.folder, "--max-new-tokens", "8", "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(PROMPT)
    assert "verified the local model gives the same 8 tokens" in done.stderr
    assert done.stderr.count("ready") == 3
    assert len(done.stderr.splitlines()) < 12


def test_demo_whose_servers_fail_shows_why(world: World, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "broken", "llama")
    save_tiny_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(b"not weights at all")
    done = world.swarm("demo", PROMPT, "--model", str(folder))
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupted_generation_ends_with_status_130(world: World) -> None:
    command = [sys.executable, "-m", "swarm_cli", "generate", world.folder, PROMPT, "--peers", world.address]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "190"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=world.environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(3)
        started_at_s = time.perf_counter()
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 130
        assert time.perf_counter() - started_at_s < 10
        assert process.stderr.read() == b""
