"""Joining the swarm: its DHT first, then our own place in it."""

from collections.abc import Sequence

from p2pswarm.core.errors import NoPeersError
from p2pswarm.dht.node import DhtNode
from swarmd.events import Events
from swarmd.reaching import Reaching


async def join(peers: Sequence[str], dht: DhtNode, reaching: Reaching, events: Events) -> None:
    """Finds the swarm, or says once that nobody answers, and goes on trying; returns when others can reach us.

    Raises `ConfigError` for a malformed peer address.
    """
    try:
        await dht.bootstrap(peers, makes_known=False)
    except NoPeersError as error:
        events("join_failed", message=str(error))
    else:
        if dht.num_contacts:
            events("joined", num_peers=dht.num_contacts)
    await reaching.settle()
