"""`swarmd` as a process: how it divides memory and measures itself, and what it says where that cannot work."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pswarm.core.ids import PeerId
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.rpc.client import RpcClient
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

pytestmark = pytest.mark.real

TIMEOUT_S = 120.0
"""Far above what a start takes alone on a machine."""

TOKEN_BYTES = 64 * 4
"""The tiny model's hidden states, in float32."""

Run = Callable[..., tuple[int, list[Mapping[str, Any]], str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a server that ends by itself: exit code, events and stderr."""
    monkeypatch.setenv("P2PSWARM_CACHE", str(tmp_path / "cache"))

    def to_the_end(*arguments: str) -> tuple[int, list[Mapping[str, Any]], str]:
        done = subprocess.run(
            command(model, tmp_path / "node.key", *arguments), capture_output=True, text=True, timeout=TIMEOUT_S
        )
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    return to_the_end


def command(model: Path, identity: Path, *arguments: str) -> list[str]:
    common = ["--host", "127.0.0.1", "--identity", str(identity), "--threads", "1", "--json"]
    return [sys.executable, "-m", "swarmd", "start", str(model), *common, *arguments]


@contextmanager
def running(model: Path, identity: Path, *arguments: str) -> Iterator[Callable[[str], Mapping[str, Any]]]:
    """A server until the block ends, and how to wait for one of its events."""
    process = subprocess.Popen(command(model, identity, *arguments), stdout=subprocess.PIPE, text=True)
    stdout = process.stdout
    assert stdout is not None

    def wait_for(name: str) -> Mapping[str, Any]:
        return next(event for event in map(json.loads, stdout) if event["event"] == name)

    try:
        yield wait_for
    finally:
        process.kill()
        process.communicate()


def only(events: list[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    (found,) = (event for event in events if event["event"] == name)
    return found


def test_a_dry_run_measures_tells_and_ends(run: Run) -> None:
    exit_code, events, stderr = run("--throughput", "dry-run", "--kv-cache", "4096 tokens")
    assert (exit_code, stderr) == (0, "")
    assert [event["event"] for event in events] == ["sized", "measured"]
    assert only(events, "sized")["num_blocks"] == 8
    measured = only(events, "measured")
    assert (measured["blocks"], measured["threads"], measured["cache_tokens"]) == ("0:8", 1, 4096)
    assert min(measured[name] for name in ("prefill_token_s", "decode_s", "batched_decode_s")) > 0
    assert measured["throughput_tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-cache", "1000 TiB"], "too little memory for one block: "),
        (["--blocks", "0:4", "--kv-cache", "1000 TiB"], "--kv-cache 1000 TiB takes 1000 TiB, and "),
        (["--dtype", "float16"], "float16 does not work on a CPU: use --dtype float32 or --dtype bfloat16"),
        (["--blocks", "0:9"], "tiny has the blocks 0:8, so not --blocks 0:9"),
    ],
)
def test_what_this_machine_cannot_do_is_said_in_one_line(run: Run, arguments: list[str], message: str) -> None:
    exit_code, events, stderr = run(*arguments)
    assert exit_code == 1
    assert message in stderr
    assert stderr.count("\n") == 1
    assert (only(events, "error")["kind"], events[-1]["event"]) == ("ConfigError", "error")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-cache", "much"], "kv-cache: wanted an amount of memory (4GiB, 512MiB or 1.5GB), a number of tokens"),
        (["--throughput", "fast"], "throughput: wanted auto, eval, dry-run or tokens per second, got 'fast'"),
        (["--dtype", "int3"], "dtype: wanted one of auto, float32, bfloat16, float16, got 'int3'"),
    ],
)
def test_what_cannot_be_read_is_wrong_usage(run: Run, arguments: list[str], message: str) -> None:
    exit_code, events, stderr = run(*arguments)
    assert (exit_code, events) == (2, [])
    assert message in stderr


def test_a_server_measures_its_line_against_another_and_corrects_what_it_announced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2PSWARM_CACHE", str(tmp_path / "cache"))
    with running(model, tmp_path / "a.key", "--blocks", "0:4") as first:
        address = first("ready")["addresses"][0]
        with running(model, tmp_path / "b.key", "--blocks", "4:8", "--peers", address) as second:
            ready = second("ready")
            assert (ready["is_line_known"], ready["line_bits_per_s"]) == (False, 100_000_000)
            measured = second("line_measured")
            assert measured["num_peers"] == 1
            assert measured["bits_per_s"] != ready["line_bits_per_s"]
            line_bits_per_s = 8 * TOKEN_BYTES * trio.run(ask_network_speed, ready["addresses"][0], ready["peer_id"])
            assert line_bits_per_s == pytest.approx(measured["bits_per_s"], rel=1e-6)


async def ask_network_speed(address: str, peer_id: PeerId) -> float:
    """What the server says it can carry, in tokens per second."""
    async with open_network(Identity.generate()) as network:
        await network.connect(address)
        return (await RpcClient(network).info(peer_id, 10.0)).info.network_tokens_per_s
