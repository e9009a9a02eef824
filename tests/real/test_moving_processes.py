"""Server processes share out a model's blocks by themselves; when some are killed, the others close the gap, and a
generation that runs through it comes to the local model's tokens. A move can be stopped, and fails loudly if it must.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.swarm import Swarm, open_swarm
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.placement.throughput import block_throughputs
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from simulations.failover.processes import Replica, Replicas

pytestmark = [pytest.mark.real, pytest.mark.slow]

NUM_SERVERS = 6
NUM_BLOCKS, BLOCKS_EACH = 30, 10
CHECK_PERIOD_S = 10.0
PROMPT = [5, 17, 99, 3]
NUM_TOKENS = 150
TOKENS_BEFORE_KILL = 20
QUIET_S = 2.5 * CHECK_PERIOD_S
SOON_S = 1.0
"""A period for tests that wait for a move."""
TIMEOUT_S = 120.0
"""Far above what anything here takes alone on a machine: tests share theirs."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return str(save_tiny_checkpoint(folder, "llama", num_hidden_layers=NUM_BLOCKS))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the servers: sums are then made in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def command(model: str, identity: Path, period_s: float) -> list[str]:
    """A server that chooses its blocks, and is as fast as the others."""
    flags = ["--json", "--host", "127.0.0.1", "--threads", "1", "--num-blocks", str(BLOCKS_EACH)]
    flags += ["--balance-check-period", str(period_s), "--throughput", "100", "--identity", str(identity)]
    return [sys.executable, "-m", "swarmd", "start", model, *flags]


@asynccontextmanager
async def open_servers(model: str, folder: Path) -> AsyncIterator[Replicas]:
    """Six servers that came one after the other, each of which chose its blocks."""
    async with trio.open_nursery() as nursery:
        servers = [
            Replica(f"server {number}", Span(0, NUM_BLOCKS), command(model, folder / f"{number}.key", CHECK_PERIOD_S))
            for number in range(NUM_SERVERS)
        ]
        replicas = Replicas(servers, nursery)
        for server in servers:
            await replicas.start(server)
        try:
            yield replicas
        finally:
            nursery.cancel_scope.cancel()


class Watch:
    """What is announced of the servers that live."""

    def __init__(self, swarm: Swarm, model_id: ModelId, replicas: Replicas) -> None:
        self._swarm = swarm
        self._model_id = model_id
        self._replicas = replicas

    async def living(self) -> Mapping[PeerId, ServerInfo]:
        announced = await self._swarm.directory.servers(self._model_id)
        alive = {replica.peer_id for replica in self._replicas.all if replica.is_ready}
        return {peer_id: info for peer_id, info in announced.items() if peer_id in alive}

    async def throughputs(self) -> list[float]:
        """Of each block, by those who are online."""
        living = await self.living()
        return block_throughputs(NUM_BLOCKS, [info for info in living.values() if info.state is ServerState.ONLINE])

    async def until_covered(self, timeout_s: float) -> None:
        with trio.fail_after(timeout_s):
            while min(await self.throughputs()) == 0:  # noqa: ASYNC110
                await trio.sleep(0.2)


def local_tokens(model: str) -> list[int]:
    local: Any = load_local_model(open_checkpoint(model))
    prompt = torch.tensor([PROMPT])
    answer = local.generate(prompt, do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
    return list(answer[0, len(PROMPT) :].tolist())


async def check_the_story(model: str, folder: Path) -> None:
    expected = await trio.to_thread.run_sync(local_tokens, model)
    config = ClientConfig(known_peers_path=None, recovery_timeout_s=10 * CHECK_PERIOD_S)
    async with open_servers(model, folder) as replicas, open_swarm(replicas.addresses, config=config) as swarm:
        loaded = await swarm.load(model)
        watch = Watch(swarm, loaded.model_id, replicas)
        throughputs = await watch.throughputs()
        best = sum(throughputs) / NUM_BLOCKS  # no arrangement of these servers serves its worst block better
        assert min(throughputs) >= 0.9 * best

        async with loaded.session(max_length=len(PROMPT) + NUM_TOKENS) as session:
            tokens: list[int] = []
            options = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
            async for token in session.generate(PROMPT, **options):
                tokens.append(token)
                if len(tokens) == TOKENS_BEFORE_KILL:
                    for peer_id, info in (await watch.living()).items():
                        if info.span.covers(NUM_BLOCKS // 2):
                            replicas[peer_id].kill()
                    await watch.until_covered(3 * CHECK_PERIOD_S)
            assert tokens == expected
            assert session.num_recoveries >= 1

        before = {peer_id: info.span for peer_id, info in (await watch.living()).items()}
        await trio.sleep(QUIET_S)
        assert {peer_id: info.span for peer_id, info in (await watch.living()).items()} == before


def test_killed_servers_are_made_up_for_by_the_others(model: str, tmp_path: Path, one_thread: None) -> None:
    trio.run(check_the_story, model, tmp_path)


class Server:
    """One process, and what it has told."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self._lines = self._read()

    async def until(self, name: str) -> dict[str, Any]:
        """The next event of that name."""
        with trio.fail_after(TIMEOUT_S):
            async for line in self._lines:
                self.events.append(json.loads(line))
                if self.events[-1]["event"] == name:
                    return self.events[-1]
        raise AssertionError(f"no {name!r} among {self.events}")

    async def _read(self) -> AsyncIterator[bytes]:
        unfinished = b""
        async for data in self.process.stdout:
            *whole, unfinished = (unfinished + data).split(b"\n")
            for line in whole:
                yield line


@asynccontextmanager
async def two_that_could_move(model: str, folder: Path) -> AsyncIterator[list[Server]]:
    """Two servers of the first blocks, of which one will move, since those of the others are dead."""
    servers: list[Server] = []
    peers: list[str] = []
    try:
        for number in range(4):
            peers_flags = ["--peers", *peers] if peers else []
            process = await trio.lowlevel.open_process(
                [*command(model, folder / f"{number}.key", SOON_S), *peers_flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            servers.append(Server(process))
            ready = await servers[-1].until("ready")
            peers = peers or ready["addresses"][:1]
        assert [server.events[-1]["blocks"] for server in servers] == ["0:10", "10:20", "20:30", "0:10"]
        yield servers
    finally:
        for server in servers:
            server.process.kill()
            await server.process.wait()


async def first_to_tell(servers: Sequence[Server], name: str) -> Server:
    """The first of the servers to have such an event."""
    found: list[Server] = []
    async with trio.open_nursery() as nursery:

        async def look(server: Server) -> None:
            await server.until(name)
            found.append(server)
            nursery.cancel_scope.cancel()

        for server in servers:
            nursery.start_soon(look, server)
    return found[0]


async def stop_in_the_middle(model: str, folder: Path) -> None:
    async with two_that_could_move(model, folder) as (one, gone, _, other):
        gone.process.kill()
        mover = await first_to_tell([one, other], "moving")
        mover.process.terminate()
        told_at_s = trio.current_time()
        await mover.until("stopped")
        with trio.fail_after(TIMEOUT_S):
            assert await mover.process.wait() == 0
        assert trio.current_time() - told_at_s < 10


def test_a_move_can_be_stopped(model: str, tmp_path: Path) -> None:
    trio.run(stop_in_the_middle, model, tmp_path)


def remove_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


async def lose_the_weights(model: str, folder: Path) -> None:
    async with two_that_could_move(model, folder) as (one, gone, _, other):
        remove_weights(Path(model))
        gone.process.kill()
        mover = await first_to_tell([one, other], "move_failed")
        told = await mover.until("error")
        assert told["kind"] == "ServerFailure"
        assert told["message"].startswith("no blocks could be loaded after a move: first ")
        with trio.fail_after(TIMEOUT_S):
            assert await mover.process.wait() == 1


def test_a_server_that_can_load_nothing_any_more_ends_with_an_error(model: str, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    trio.run(lose_the_weights, str(copy), tmp_path)
