"""Measures, over and over, the round trips to the servers likely to be next (`swarmd/next_servers.py`).

A connection that is open measures its round trip by itself (its keep-alive), so that most rounds send nothing.
"""

from collections.abc import Iterable, Mapping
from random import Random

import trio

from p2pswarm.core.errors import SwarmingError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.directory.view import ModelView
from p2pswarm.net.network import Network
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.round_trip import measure_round_trip_s
from swarmd.next_servers import RoundTrips, likely_next

PERIOD_S = 20.0
"""Between two rounds, and two looks at who is there."""
JITTER = 0.1
"""Rounds vary by this part, so that servers that started together do not measure together."""
TIMEOUT_S = 5.0
"""A server further away than this is no use in a chain."""


class Pings:
    """Round trips from the server of `info`, while `follow` runs."""

    def __init__(self, info: ServerInfo, network: Network, rpc: RpcClient, random: Random) -> None:
        self._info = info
        self._network = network
        self._rpc = rpc
        self._random = random
        self._round_trips = RoundTrips()

    @property
    def round_trips_s(self) -> Mapping[PeerId, float]:
        """To the nearest of the servers measured lately."""
        return self._round_trips.nearest(trio.current_time())

    async def follow(self, view: ModelView) -> None:
        """Measures until cancelled."""
        while True:
            await self.measure(view.servers.values())
            await trio.sleep(PERIOD_S * self._random.uniform(1 - JITTER, 1 + JITTER))

    async def measure(self, servers: Iterable[ServerInfo]) -> None:
        """One round, to all at once."""
        async with trio.open_nursery() as nursery:
            for server in likely_next(self._info, servers, self._random):
                nursery.start_soon(self._measure, server)

    async def _measure(self, server: ServerInfo) -> None:
        self._network.add_addresses(server.peer_id, server.addresses)
        try:
            round_trip_s = await measure_round_trip_s(self._network, self._rpc, server.peer_id, TIMEOUT_S)
        except SwarmingError:
            self._round_trips.forget(server.peer_id)  # a client that tries it will hear why
        else:
            self._round_trips.note(server.peer_id, round_trip_s, trio.current_time())
