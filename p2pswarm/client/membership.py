"""A client's place in a swarm: its network, its DHT node, the directory of models. Without torch: enough to look round.

`client/swarm.py` loads models on top of it.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
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
from p2pswarm.net.private.invitation import accept_invitations
from p2pswarm.net.private.private_swarm import PrivateSwarm
from p2pswarm.net.private.swarm_key import SwarmKey


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
    peers: Sequence[str] = (),
    *,
    identity: Identity | None = None,
    config: ClientConfig | None = None,
    swarm_key: SwarmKey | None = None,
) -> AsyncIterator[Membership]:
    """Joins the swarm that the nodes at `peers` belong to, or those remembered from last time.

    `peers` are multiaddrs, or invitations to a private swarm, which hold its key; else `swarm_key` is the way into one.
    `identity`: by default a new one each time, which a swarm with a list of members does not let in. Raises
    `NoPeersError` when nobody answers or lets us in, with the reason; `ConfigError` for a malformed address.
    """
    addresses, key = accept_invitations(peers, swarm_key)
    config = config or ClientConfig()
    private = None
    if key is not None:
        config = replace(config, known_peers_path=_of_swarm(key, config.known_peers_path))
        private = PrivateSwarm.of(key, kept=_kept_members(config.known_peers_path))
    with single_error():
        async with (
            open_network(identity or Identity.generate(), private=private) as network,
            join_over(network, addresses, config, SystemClock(), SystemRandom()) as membership,
        ):
            yield membership


def _of_swarm(key: SwarmKey, known_peers_path: Path | None) -> Path | None:
    """A file for each private swarm: its peers are nobody else's business."""
    return None if known_peers_path is None else known_peers_path.with_stem(f"{known_peers_path.stem}-{key.swarm_id}")


def _kept_members(known_peers_path: Path | None) -> Path | None:
    return None if known_peers_path is None else known_peers_path.with_suffix(".members")


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
