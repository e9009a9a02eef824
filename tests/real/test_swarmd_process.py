"""`swarmd` as a process: it starts, tells what it serves, is found, and ends in order or with one clear line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import trio

from p2pswarm.core.clock import SystemClock
from p2pswarm.core.errors import ServerBusy, SessionLost
from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.node import DhtNode
from p2pswarm.directory.directory import Directory
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.rpc.client import RpcClient
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import OpenSession, Step

pytestmark = pytest.mark.real

READY_TIMEOUT_S = 60.0
"""Far above what a start takes alone on a machine: tests share theirs."""


class Process:
    """A `swarmd` that writes JSON events."""

    def __init__(self, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "swarmd", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.events: list[Mapping[str, Any]] = []

    def wait_for(self, event: str) -> Mapping[str, Any]:
        """The event's fields; fails with what the process said when it ends without it."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return self.events[-1]
        pytest.fail(f"no {event!r} among {self.events}; stderr: {self.popen.communicate()[1]}")

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, list[str], str]:
        """Exit code, the names of the events to come, and stderr."""
        self.popen.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, list[str], str]:
        stdout, stderr = self.popen.communicate(timeout=READY_TIMEOUT_S)
        return self.popen.returncode, [json.loads(line)["event"] for line in stdout.splitlines()], stderr


@contextmanager
def swarmd(*arguments: str) -> Iterator[Process]:
    process = Process(*arguments)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.communicate()


def run_swarmd(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "swarmd", *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a server on loopback with an identity of its own."""

    def arguments(name: str, *more: str) -> list[str]:
        identity = str(tmp_path / f"{name}.key")
        common = ["--host", "127.0.0.1", "--identity", identity, "--threads", "1", "--json"]
        return ["start", str(model), *common, *more]

    return arguments


async def read_directory(address: str, model_id: str) -> Mapping[str, tuple[Span, ServerState]]:
    """Which blocks a client finds in the swarm."""
    servers = await read_servers(address, model_id)
    return {peer_id: (info.span, info.state) for peer_id, info in servers.items()}


async def read_servers(address: str, model_id: str) -> Mapping[PeerId, ServerInfo]:
    """What a client finds in the swarm."""
    async with open_network(Identity.generate()) as network, trio.open_nursery() as nursery:
        dht = DhtNode(network, SystemClock(), Random(), DhtConfig(serve=False))
        await nursery.start(dht.run)
        await dht.bootstrap([address])
        servers = await Directory(dht, SystemClock()).servers(ModelId(model_id))
        nursery.cancel_scope.cancel()
    return servers


def test_a_server_tells_when_it_is_ready_and_ends_in_order(start: Callable[..., list[str]]) -> None:
    with swarmd(*start("a", "--blocks", "2:5", "--name", "Anna")) as server:
        ready = server.wait_for("ready")
        assert [event["event"] for event in server.events] == ["starting", "loading", "ready"]
        assert (ready["blocks"], ready["start_block"], ready["end_block"]) == ("2:5", 2, 5)
        assert ready["num_model_blocks"] == 8
        assert ready["dtype"] == "float32"
        (address,) = ready["addresses"]
        assert address.endswith(f"/p2p/{ready['peer_id']}")
        assert f"--peers {address}" in ready["join_command"]

        async def ask() -> None:
            async with open_network(Identity.generate()) as network:
                await network.connect(address)
                info = (await RpcClient(network).info(ready["peer_id"], 10.0)).info
                assert info.public_name == "Anna"
                assert info.state is ServerState.ONLINE
                assert info.throughput_tokens_per_s > 0
                assert info.cache_tokens_left == ready["cache_tokens"]

        trio.run(ask)
        exit_code, events, stderr = server.stop()
        assert (exit_code, events, stderr) == (0, ["draining", "stopped"], "")


def test_servers_find_each_other_take_what_is_missing_and_say_goodbye(start: Callable[..., list[str]]) -> None:
    with swarmd(*start("a", "--num-blocks", "3")) as first:
        ready = first.wait_for("ready")
        assert ready["blocks"] == "0:3"
        address = ready["addresses"][0]
        with swarmd(*start("b", "--num-blocks", "5", "--peers", address)) as second:
            joined = second.wait_for("ready")
            assert joined["blocks"] == "3:8"
            servers = trio.run(read_directory, address, ready["model_id"])
            assert servers == {
                ready["peer_id"]: (Span(0, 3), ServerState.ONLINE),
                joined["peer_id"]: (Span(3, 8), ServerState.ONLINE),
            }
            assert second.stop(signal.SIGINT)[0] == 0
        assert trio.run(read_directory, address, ready["model_id"]) == {
            ready["peer_id"]: (Span(0, 3), ServerState.ONLINE)
        }


def test_a_server_announces_how_far_away_the_next_one_is(start: Callable[..., list[str]]) -> None:
    with swarmd(*start("a", "--blocks", "4:8")) as last:
        ready = last.wait_for("ready")
        address = ready["addresses"][0]
        with swarmd(*start("b", "--blocks", "0:4", "--peers", address)) as first:
            joined = first.wait_for("ready")

            async def until_announced() -> Mapping[PeerId, float]:
                with trio.fail_after(READY_TIMEOUT_S):
                    while True:
                        servers = await read_servers(address, ready["model_id"])
                        if servers[joined["peer_id"]].next_rtts_s:
                            return servers[joined["peer_id"]].next_rtts_s
                        await trio.sleep(0.5)

            round_trips_s = trio.run(until_announced)
            assert round_trips_s.keys() == {ready["peer_id"]}
            assert 0 < round_trips_s[ready["peer_id"]] < 1


def test_a_second_signal_ends_a_server_at_once(start: Callable[..., list[str]]) -> None:
    with swarmd(*start("a", "--grace-period", "60")) as server:
        server.wait_for("ready")
        os.kill(server.popen.pid, signal.SIGTERM)
        exit_code, _, _ = server.stop()
        assert exit_code == 0


def test_a_server_that_is_asked_to_stop_lets_a_session_go_on_and_takes_no_new_one(
    start: Callable[..., list[str]],
) -> None:
    with swarmd(*start("a", "--blocks", "0:2")) as server:
        ready = server.wait_for("ready")
        peer_id, model_id = ready["peer_id"], ModelId(ready["model_id"])

        def opening(name: str) -> OpenSession:
            return OpenSession(SessionId(name), model_id, Span(0, 2), max_length=16, batch_size=1)

        async def use_to_the_end() -> int:
            async with open_network(Identity.generate()) as network:
                await network.connect(ready["addresses"][0])
                client = RpcClient(network)
                async with client.open_session(peer_id, opening("first"), 10.0) as session:
                    server.popen.send_signal(signal.SIGTERM)
                    assert await trio.to_thread.run_sync(server.wait_for, "draining") is not None
                    with pytest.raises(ServerBusy):
                        async with client.open_session(peer_id, opening("second"), 10.0):
                            pass
                    for position in range(5):
                        token = encode_tensor(torch.randn(1, 1, 64))
                        reply = await session.step(Step(position, position, token), 10.0)
                    await trio.sleep(3)  # at rest, it is handed back
                    with pytest.raises(SessionLost):
                        await session.step(Step(5, 5, token), 10.0)
                    return reply.position

        assert trio.run(use_to_the_end) == 5
        assert server.end() == (0, ["stopped"], "")


def test_a_signal_in_the_middle_of_a_start_ends_it(start: Callable[..., list[str]]) -> None:
    with swarmd(*start("a")) as server:
        server.wait_for("starting")
        exit_code, events, stderr = server.stop()
        assert (exit_code, stderr) == (0, "")
        assert "ready" not in events


def test_an_identity_in_use_is_refused(start: Callable[..., list[str]]) -> None:
    with swarmd(*start("a")) as server:
        server.wait_for("starting")
        exit_code, stdout, stderr = run_swarmd(*start("a"))
        assert exit_code == 1
        assert "another node is running with the identity" in stderr
        assert json.loads(stdout.splitlines()[-1])["event"] == "error"


def test_a_taken_port_is_named(start: Callable[..., list[str]]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        exit_code, _, stderr = run_swarmd(*start("a", "--port", str(port)))
    assert exit_code == 1
    assert stderr.count("\n") == 1
    assert str(port) in stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dtype", "float16", "--device", "cpu"], "use --dtype float32 or --dtype bfloat16"),
        (["--blocks", "6:9"], "has the blocks 0:8, so not --blocks 6:9"),
        (["--max-length", "100000"], "takes up to 256 tokens, so not --max-length 100000"),
    ],
)
def test_what_the_model_or_machine_cannot_do_is_one_clear_line(
    start: Callable[..., list[str]], arguments: list[str], complaint: str
) -> None:
    exit_code, stdout, stderr = run_swarmd(*start("a", *arguments))
    assert exit_code == 1
    assert stderr.count("\n") == 1
    assert complaint in stderr
    last = json.loads(stdout.splitlines()[-1])
    assert last["event"] == "error"
    assert complaint in last["message"]


def test_a_model_that_is_not_there_or_is_a_pickle_is_refused(tmp_path: Path, model: Path) -> None:
    identity = ["--identity", str(tmp_path / "k.key"), "--host", "127.0.0.1"]
    assert "nowhere" in run_swarmd("start", "./nowhere", *identity)[2]
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((model / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    exit_code, _, stderr = run_swarmd("start", str(pickled), *identity)
    assert exit_code == 1
    assert "safetensors" in stderr


@pytest.mark.parametrize(
    "arguments",
    [["start"], ["start", "m", "--blocks", "x"], ["start", "m", "--bogus"], ["start", "m", "--port", "x"], []],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    exit_code, stdout, stderr = run_swarmd(*arguments)
    assert exit_code == 2
    assert stdout == ""
    assert "swarmd" in stderr


def test_a_bootstrap_node_needs_no_model(tmp_path: Path, start: Callable[..., list[str]]) -> None:
    identity = str(tmp_path / "bootstrap.key")
    with swarmd("bootstrap", "--host", "127.0.0.1", "--identity", identity, "--json") as bootstrap:
        address = bootstrap.wait_for("ready")["addresses"][0]
        with swarmd(*start("a", "--peers", address)) as server:
            ready = server.wait_for("ready")
            assert "joined" in [event["event"] for event in server.events]
            servers = trio.run(read_directory, address, ready["model_id"])
            assert servers == {ready["peer_id"]: (Span(0, 8), ServerState.ONLINE)}
        assert bootstrap.stop()[0] == 0


def test_people_read_a_few_lines(tmp_path: Path, start: Callable[..., list[str]]) -> None:
    bootstrap = subprocess.Popen(
        [sys.executable, "-m", "swarmd", "bootstrap", "--host", "127.0.0.1", "--identity", str(tmp_path / "b.key")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert bootstrap.stdout is not None
    address = bootstrap.stdout.readline().split("--peers ")[1].strip()
    arguments = [argument for argument in start("a", "--peers", address) if argument != "--json"]
    server = subprocess.Popen(
        [sys.executable, "-m", "swarmd", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    lines = [next(server.stdout) for _ in range(8)]
    for process in (server, bootstrap):
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=READY_TIMEOUT_S)
        assert stdout.endswith("stopped\n")
        assert stderr == ""
    assert lines[0] == "joined the swarm: 1 nodes known\n"
    assert lines[1] == "others can dial this node (1 of 1 peers got through)\n"
    assert lines[2].startswith("8 of 8 blocks: ")
    assert lines[3] == "loading tiny: blocks 0:8, float32\n"
    assert lines[4].startswith("serving blocks 0:8 of 8 of ")
    assert lines[6].startswith("  announced with ")
    assert lines[7].startswith("  others join with: swarmd start ")


@pytest.mark.alone
def test_help_is_quick() -> None:
    took_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        assert run_swarmd("start", "--help")[0] == 0
        took_s.append(time.perf_counter() - started_s)
    assert min(took_s) < 0.3
