"""A client's place in a swarm: its network, its DHT node, the directory of models. Without torch: enough to look round.

`client/swarm.py` loads models on top of it.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random, SystemRandom

import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.single_error import single_error
from p2pswarm.core.clock import Clock, SystemClock
from p2pswarm.core.errors import NoPeersError
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.node import DhtNode
from p2pswarm.directory.directory import Directory
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Network


@dataclass(frozen=True, slots=True)
class Membership:
    """What a client has once it has joined; ends when the context it came from is left."""

    network: Network
    dht: DhtNode
    directory: Directory
    config: ClientConfig
    nursery: trio.Nursery
    """For what is to run as long as the membership lasts."""


@asynccontextmanager
async def join_swarm(
    peers: Sequence[str] = (), *, identity: Identity | None = None, config: ClientConfig | None = None
) -> AsyncIterator[Membership]:
    """Joins the swarm that the nodes at `peers` (multiaddrs) belong to, or those remembered from last time.

    Raises `NoPeersError` when none of them answers, `ConfigError` for a malformed address. `identity`: by default a new
    one each time.
    """
    with single_error():
        async with (
            open_network(identity or Identity.generate()) as network,
            join_over(network, peers, config or ClientConfig(), SystemClock(), SystemRandom()) as membership,
        ):
            yield membership


@asynccontextmanager
async def join_over(
    network: Network, peers: Sequence[str], config: ClientConfig, clock: Clock, random: Random
) -> AsyncIterator[Membership]:
    """The same over a network that is already open: a simulated one, or one shared with something else."""
    with single_error():
        async with trio.open_nursery() as nursery:
            dht_config = DhtConfig(serve=False, bootstrap_timeout_s=config.join_timeout_s)
            dht = DhtNode(network, clock, random, dht_config, config.known_peers_path)
            await nursery.start(dht.run)
            await dht.bootstrap(peers)
            if not dht.statistics().num_contacts:
                raise NoPeersError("no peer was given, and none is remembered from before: give the address of any one")
            try:
                yield Membership(network, dht, Directory(dht, clock), config, nursery)
            finally:
                nursery.cancel_scope.cancel()
