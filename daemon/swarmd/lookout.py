"""Who serves the model now: those who are announced, without those who do not answer.

The announcement of a server that was killed stays for a minute and a half, too long for its blocks to wait. So whoever
is about to decide something asks some of the others for a sign of life. Over a swarm's servers and looks, everybody is
asked often. Decides nothing; `swarmd/balancing.py` does.
"""

from collections.abc import Iterable, Sequence
from random import Random

import trio

from p2pswarm.core.errors import SwarmingError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.directory.directory import Directory
from p2pswarm.net.network import Network
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.round_trip import measure_round_trip_s

MAX_ASKED = 24
"""In one look, those first that were silent in the last one: a connection each, which stays open for later."""
ASK_TIMEOUT_S = 5.0
"""A server further away than this is no use in a chain."""


class Lookout:
    """Looks from the server of `own` at the others of its model."""

    def __init__(
        self, own: ServerInfo, directory: Directory, network: Network, calls: RpcClient, random: Random
    ) -> None:
        self._own = own
        self._view = directory.view(own.model_id)
        self._network = network
        self._calls = calls
        self._random = random
        self._silent: set[PeerId] = set()

    async def others(self) -> Sequence[ServerInfo]:
        """The other servers that live, in whatever state."""
        await self._view.refresh()
        announced = dict(self._view.servers)
        announced.pop(self._own.peer_id, None)
        self._silent &= announced.keys()
        asked = self._whom_to_ask(announced.values())
        answered: set[PeerId] = set()
        async with trio.open_nursery() as nursery:
            for server in asked:
                nursery.start_soon(self._ask, server, answered)
        self._silent |= {server.peer_id for server in asked}
        self._silent -= answered
        if asked and not answered:
            return list(announced.values())  # it is we who are cut off: nothing is known of them
        return [server for server in announced.values() if server.peer_id not in self._silent]

    def _whom_to_ask(self, servers: Iterable[ServerInfo]) -> list[ServerInfo]:
        online = [server for server in servers if server.state is ServerState.ONLINE]
        self._random.shuffle(online)
        return sorted(online, key=lambda server: server.peer_id not in self._silent)[:MAX_ASKED]

    async def _ask(self, server: ServerInfo, answered: set[PeerId]) -> None:
        self._network.add_addresses(server.peer_id, server.addresses)
        try:
            await measure_round_trip_s(self._network, self._calls, server.peer_id, ASK_TIMEOUT_S)
        except SwarmingError:
            return
        answered.add(server.peer_id)
