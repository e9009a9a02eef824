"""A node of the DHT without a model: an address that newcomers can be given, which lasts while servers come and go."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from random import SystemRandom

import trio

from p2pswarm.core.clock import SystemClock
from p2pswarm.core.errors import NoPeersError
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.dht.node import DhtNode
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from swarmd.events import Events
from swarmd.identity_file import known_peers_path


async def run_bootstrap(
    *,
    identity_path: Path,
    listen: Sequence[str],
    announce: Sequence[str],
    peers: Sequence[str],
    events: Events,
    stop: trio.Event,
) -> None:
    """Serves the DHT until `stop` is set. Raises `ConfigError` when it cannot listen, or for a malformed peer address.

    Where none of `peers` answers it runs on, since it may be the first to be back after an outage, and asks them again.
    """
    events("starting", version=version("p2pswarm"))
    identity = Identity.load_or_create(identity_path)
    async with (
        open_network(identity, listen=listen, announce=announce) as network,
        open_transparent_nursery() as nursery,
    ):
        dht = DhtNode(network, SystemClock(), SystemRandom(), known_peers_path=known_peers_path(identity_path))
        await nursery.start(dht.run)
        events("ready", peer_id=network.peer_id, addresses=list(network.addresses))
        nursery.start_soon(_join, dht, peers, events)
        await stop.wait()
        nursery.cancel_scope.cancel()
    events("stopped")


async def _join(dht: DhtNode, peers: Sequence[str], events: Events) -> None:
    try:
        await dht.bootstrap(peers)
    except NoPeersError as error:
        events("join_failed", message=str(error))
    else:
        if dht.num_contacts:
            events("joined", num_peers=dht.num_contacts)
