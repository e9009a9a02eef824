"""Thirty `swarmd bootstrap` processes started at once: they find each other, each leads a client who knows nobody else
to the records announced through all thirty, and they idle cheaply."""

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
from p2pswarm.dht.record import make_record
from p2pswarm.directory.announcement import model_key
from p2pswarm.directory.directory import Directory
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Network
from p2pswarm.wire.server_info import encode_server_info

NUM_NODES = 30
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
RECORD_LIFETIME_S = 300.0
"""Nobody renews it: what is found was stored, or handed over, while the nodes started."""
SETTLE_S = 10.0
"""After the last node listens, until everybody is to find everything."""
IDLE_WINDOW_S = 20.0
MAX_IDLE_CPU = 0.005
"""Of one core, each."""
START_TIMEOUT_S = 120.0
"""Thirty interpreters on two cores."""

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.exhaustive]


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
async def client_of(address: str, network: Network) -> AsyncIterator[DhtNode]:
    """A client that knows nobody but the node at `address`. All share a network: else a third of the machine's time
    would go into nine hundred handshakes of clients."""
    async with trio.open_nursery() as nursery:
        dht = DhtNode(network, SystemClock(), Random(), DhtConfig(serve=False))
        await nursery.start(dht.run)
        await dht.bootstrap([address])
        yield dht
        nursery.cancel_scope.cancel()


async def announce_by_way_of(address: str, network: Network) -> PeerId:
    """Announces a server with an identity of its own, once."""
    server = Identity.generate()
    info = replace(INFO, peer_id=server.peer_id)
    now_unix_s = SystemClock().unix_time_s()
    record = make_record(server, model_key(MODEL), encode_server_info(info), 1, now_unix_s + RECORD_LIFETIME_S)
    async with client_of(address, network) as dht:
        assert await dht.put(record) >= 1
    return server.peer_id


async def servers_by_way_of(address: str, network: Network) -> frozenset[PeerId]:
    async with client_of(address, network) as dht:
        return frozenset(await Directory(dht, SystemClock()).servers(MODEL))


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
        async with open_network(Identity.generate()) as network:
            announced = {await announce_by_way_of(addresses[0], network)}
            for node in others:
                with trio.fail_after(START_TIMEOUT_S):
                    addresses.append(await trio.to_thread.run_sync(node.ready_address, abandon_on_cancel=True))
                announced.add(await announce_by_way_of(addresses[-1], network))  # while the others still start
            await trio.sleep(SETTLE_S)
            found = [await servers_by_way_of(address, network) for address in addresses]
        assert len(announced) == NUM_NODES
        assert [len(announced & servers) for servers in found] == [NUM_NODES] * NUM_NODES
        processes = [psutil.Process(node.process.pid) for node in (first, *others)]
        used = await trio.to_thread.run_sync(idle_cpu, processes, IDLE_WINDOW_S)
    logger.info("idle CPU of a node, of a core: %.4f at most, %.4f on average", max(used), sum(used) / len(used))
    assert max(used) < MAX_IDLE_CPU, f"idle CPU per node, of a core: {sorted(used)}"
    assert all_logs(tmp_path) == ""
