"""A node of the DHT without a model: an address that newcomers can be given, which lasts while servers come and go."""

from importlib.metadata import version
from pathlib import Path
from random import Random

import trio

from p2pswarm.core.clock import Clock
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.dht.node import DhtNode
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from swarmd.config import NodeConfig
from swarmd.events import Events
from swarmd.identity_file import known_peers_path
from swarmd.joining import join
from swarmd.listen import listen_addresses
from swarmd.private_swarm import private_swarm_of
from swarmd.reaching import Reaching
from swarmd.unused_memory import give_unused_memory_back


async def run_bootstrap(
    config: NodeConfig, identity_path: Path, events: Events, stop: trio.Event, *, clock: Clock, random: Random
) -> None:
    """Serves the DHT until `stop` is set. Raises `ConfigError` when it cannot listen, or for a malformed peer address.

    Where none of its peers answers it runs on, since it may be the first to be back after an outage, and asks them
    again.
    """
    events("starting", version=version("p2pswarm"))
    identity = Identity.load_or_create(identity_path)
    private = private_swarm_of(config, identity_path, identity.peer_id)
    listen = listen_addresses(config.host, config.port)
    async with (
        open_network(identity, listen=listen, announce=config.announce, private=private) as network,
        open_transparent_nursery() as nursery,
    ):
        dht = DhtNode(network, clock, random, known_peers_path=known_peers_path(identity_path, private))
        await nursery.start(dht.run)
        reaching = Reaching(config, network, dht, clock, random, events)
        await nursery.start(reaching.run)
        nursery.start_soon(give_unused_memory_back)
        events("ready", peer_id=network.peer_id, addresses=list(network.addresses))
        nursery.start_soon(join, config.peer_addresses, dht, reaching, events)
        if private is not None:
            nursery.start_soon(private.members.raise_when_removed, network.peer_id)
        await stop.wait()
        nursery.cancel_scope.cancel()
    events("stopped")
