"""Thirty `swarmd bootstrap` processes started at once: they find each other, lead to all records, and idle cheaply."""

import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import psutil
import pytest
import trio

from p2pswarm.core.clock import SystemClock
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.node import DhtNode
from p2pswarm.directory.announcer import Announcer
from p2pswarm.directory.directory import Directory
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Network

NUM_NODES = 30
ANNOUNCED_BY = range(0, NUM_NODES, 6)
"""The nodes by way of which a server announces itself, as soon as they listen, while the others still start."""
MODEL = ModelId("tiny@0123456789abcdef")
INFO = ServerInfo(
    peer_id=PeerId(""),
    model_id=MODEL,
    span=Span(0, 4),
    state=ServerState.ONLINE,
    addresses=("/ip4/127.0.0.1/tcp/4001",),
    num_model_blocks=8,
    throughput_tokens_per_s=100.0,
    inference_tokens_per_s=200.0,
    forward_tokens_per_s=3000.0,
    network_tokens_per_s=4000.0,
    dtype="float32",
)
SETTLE_S = 10.0
"""After the last node listens, until everybody is to find everything."""
IDLE_WINDOW_S = 20.0
MAX_IDLE_CPU = 0.005
"""Of one core, each."""
START_TIMEOUT_S = 120.0
"""Thirty interpreters on two cores."""

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.real, pytest.mark.slow]


@dataclass(frozen=True, slots=True)
class NodeProcess:
    process: subprocess.Popen[str]

    def ready_address(self) -> str:
        """Waits until it listens."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == "ready":
                return str(event["addresses"][0])
        raise AssertionError(f"a node ended before it was ready, with {self.process.wait()}")


@contextmanager
def bootstrap_process(folder: Path, name: str, *peers: str) -> Iterator[NodeProcess]:
    command = [sys.executable, "-m", "swarmd", "bootstrap", "--json", "--host", "127.0.0.1", "--port", "0"]
    command += ["--identity", str(folder / f"{name}.key"), *(["--peers", *peers] if peers else [])]
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield NodeProcess(process)
        finally:
            process.terminate()
            process.communicate(timeout=20)
    assert process.returncode == 0


@asynccontextmanager
async def client_of(address: str) -> AsyncIterator[tuple[Network, DhtNode]]:
    """A client that knows nobody but the node at `address`."""
    async with open_network(Identity.generate()) as network, trio.open_nursery() as nursery:
        dht = DhtNode(network, SystemClock(), Random(), DhtConfig(serve=False))
        await nursery.start(dht.run)
        await dht.bootstrap([address])
        yield network, dht
        nursery.cancel_scope.cancel()


async def announce_by_way_of(address: str, owners: set[PeerId]) -> None:
    """Announces a server, until cancelled."""
    async with client_of(address) as (network, dht):
        announcer = Announcer(dht, network, SystemClock(), Random())
        owners.add(network.peer_id)
        await announcer.announce(replace(INFO, peer_id=network.peer_id))
        await announcer.run()


async def find_by_way_of(address: str, found: dict[str, frozenset[PeerId]]) -> None:
    async with client_of(address) as (_, dht):
        found[address] = frozenset(await Directory(dht, SystemClock()).servers(MODEL))


def idle_cpu(processes: list[psutil.Process], window_s: float) -> list[float]:
    """The part of a core that each used."""
    before = [sum(process.cpu_times()[:2]) for process in processes]
    psutil.cpu_percent(interval=window_s)
    return [
        (sum(process.cpu_times()[:2]) - used_s) / window_s for process, used_s in zip(processes, before, strict=True)
    ]


def all_logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("*.log")))


async def test_thirty_nodes_joining_at_once_all_find_all_records_and_idle_cheaply(tmp_path: Path):
    with ExitStack() as stack:
        first = stack.enter_context(bootstrap_process(tmp_path, "first"))
        addresses = [await trio.to_thread.run_sync(first.ready_address)]
        others = [
            stack.enter_context(bootstrap_process(tmp_path, f"node-{index}", addresses[0]))
            for index in range(1, NUM_NODES)
        ]
        owners: set[PeerId] = set()
        found: dict[str, frozenset[PeerId]] = {}
        async with trio.open_nursery() as announcers:
            announcers.start_soon(announce_by_way_of, addresses[0], owners)
            for index, node in enumerate(others, start=1):
                with trio.fail_after(START_TIMEOUT_S):
                    addresses.append(await trio.to_thread.run_sync(node.ready_address, abandon_on_cancel=True))
                if index in ANNOUNCED_BY:
                    announcers.start_soon(announce_by_way_of, addresses[-1], owners)
            await trio.sleep(SETTLE_S)
            for address in addresses:
                await find_by_way_of(address, found)
            announcers.cancel_scope.cancel()
        assert len(found) == NUM_NODES
        assert len(owners) == len(ANNOUNCED_BY)
        assert [len(servers & owners) for servers in found.values()] == [len(owners)] * NUM_NODES
        processes = [psutil.Process(node.process.pid) for node in (first, *others)]
        used = await trio.to_thread.run_sync(idle_cpu, processes, IDLE_WINDOW_S)
    logger.info("idle CPU of a node, of a core: %.4f at most, %.4f on average", max(used), sum(used) / len(used))
    assert max(used) < MAX_IDLE_CPU, f"idle CPU per node, of a core: {sorted(used)}"
    assert all_logs(tmp_path) == ""
