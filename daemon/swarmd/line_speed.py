"""How fast this machine's line is: measured once against other servers of the swarm, and remembered for a day.

No third party's host is asked. Where no other server is known, an ordinary line is assumed until one is. A server on
the same machine says nothing of the line, so those on others count, if there are any.
"""

import json
import logging
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import trio

from p2pswarm.checkpoint.cache_directory import cache_directory, write_atomically
from p2pswarm.core.clock import Clock
from p2pswarm.core.errors import ConfigError, SwarmingError
from p2pswarm.core.ids import ModelId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.directory.directory import Directory
from p2pswarm.net.network import Network
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.speed_tests import measure_line_bits_per_s
from swarmd.events import Events
from swarmd.throughput import ASSUMED_LINE_BITS_PER_S

MAX_PEERS = 5
"""Measured against, one after the other."""
BEST_PEERS = 3
"""Of which the median counts: a slow one shows its own line and not ours."""
TIMEOUT_S = 20.0
"""For one amount of bytes."""
LOOK_PERIOD_S = 20.0
"""Between two looks whether there is anybody to measure against."""
MAX_AGE_S = 24 * 3600.0
FILE_NAME = "line-speeds.json"
MAX_ENTRIES = 16

logger = logging.getLogger(__name__)


def line_speed(measured_bits_per_s: Sequence[float]) -> float:
    """What a line carries that showed these speeds to different peers."""
    return statistics.median(sorted(measured_bits_per_s, reverse=True)[:BEST_PEERS])


def hosts(addresses: Iterable[str]) -> frozenset[str]:
    """The machines that the multiaddrs lead to, such as `192.0.2.7`."""
    return frozenset(parts[2] for address in addresses if len(parts := address.split("/")) > 2)


def whom_to_measure(own: Iterable[str], servers: Iterable[ServerInfo], random: Random) -> list[ServerInfo]:
    """Some of the servers that answer, away from the machine of our `own` addresses where there are such."""
    online = [server for server in servers if server.state is ServerState.ONLINE]
    away = [server for server in online if not hosts(server.addresses) & hosts(own)]
    candidates = away or online
    return random.sample(candidates, min(MAX_PEERS, len(candidates)))


class RememberedLine:
    """The speed measured last, in a file, for as long as the machine keeps its addresses."""

    def __init__(self, addresses: Iterable[str], clock: Clock, path: Path | None = None) -> None:
        self._key = " ".join(sorted(hosts(addresses)))
        self._clock = clock
        self._path = path or cache_directory() / FILE_NAME

    def find(self) -> float | None:
        """Bits per second; None where nothing recent is known."""
        match self._read().get(self._key):
            case {"bits_per_s": float(bits_per_s), "unix_time_s": float(unix_time_s)} if (
                0 < bits_per_s < float("inf") and 0 <= self._clock.unix_time_s() - unix_time_s < MAX_AGE_S
            ):
                return bits_per_s
        return None

    def keep(self, bits_per_s: float) -> None:
        """Raises `ConfigError` where nothing can be written."""
        entries = self._read()
        entries.pop(self._key, None)
        entries[self._key] = {"bits_per_s": bits_per_s, "unix_time_s": self._clock.unix_time_s()}
        newest = dict(list(entries.items())[-MAX_ENTRIES:])
        write_atomically(self._path, lambda temporary: temporary.write_text(json.dumps(newest, indent=1)))

    def _read(self) -> dict[str, object]:
        try:
            entries = json.loads(self._path.read_text())
        except (OSError, ValueError):  # not there yet, or damaged: it is measured again
            return {}
        return entries if isinstance(entries, dict) else {}


class Line:
    """The speed to announce, which gets better while `measure` runs."""

    def __init__(self, remembered: RememberedLine, *, is_measured_anew: bool) -> None:
        self._remembered = remembered
        kept = None if is_measured_anew else remembered.find()
        self.is_known = kept is not None
        self.bits_per_s = kept or ASSUMED_LINE_BITS_PER_S

    async def measure(
        self, model_id: ModelId, directory: Directory, network: Network, rpc: RpcClient, random: Random, events: Events
    ) -> None:
        """Returns once the speed is known."""
        while not self.is_known:
            servers = dict(await directory.servers(model_id))
            servers.pop(network.peer_id, None)
            own = map(str, network.own_listen_addresses())
            measured = await _measure_all(whom_to_measure(own, servers.values(), random), network, rpc)
            if not measured:
                await trio.sleep(LOOK_PERIOD_S * random.uniform(0.9, 1.1))
                continue
            self.bits_per_s, self.is_known = line_speed(measured), True
            try:
                self._remembered.keep(self.bits_per_s)
            except ConfigError as error:  # a server that runs need not end for it
                logger.warning("the speed of the line will be measured again: %s", error)
            events("line_measured", bits_per_s=round(self.bits_per_s), num_peers=len(measured))


async def _measure_all(servers: Iterable[ServerInfo], network: Network, rpc: RpcClient) -> list[float]:
    measured = []
    for server in servers:
        network.add_addresses(server.peer_id, server.addresses)
        try:
            measured.append(await measure_line_bits_per_s(network, rpc, server.peer_id, TIMEOUT_S))
        except SwarmingError as error:
            logger.info("%s gave no speed test: %s", server.peer_id, error)
    return measured
