"""Six server processes share out a model's blocks by themselves; when two are killed, the others close the gap, and a
generation that runs through it comes to the local model's tokens.
"""

import sys
from collections.abc import AsyncIterator, Iterator, Mapping
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
QUIET_S = 4 * CHECK_PERIOD_S


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


@asynccontextmanager
async def open_servers(model: str, folder: Path) -> AsyncIterator[Replicas]:
    """Six servers that came one after the other, each of which chose its blocks."""
    async with trio.open_nursery() as nursery:
        flags = ["--json", "--host", "127.0.0.1", "--threads", "1", "--num-blocks", str(BLOCKS_EACH)]
        flags += ["--balance-check-period", str(CHECK_PERIOD_S), "--throughput", "100"]
        command = [sys.executable, "-m", "swarmd", "start", model, *flags]
        servers = [
            Replica(f"server {number}", Span(0, NUM_BLOCKS), [*command, "--identity", str(folder / f"{number}.key")])
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
