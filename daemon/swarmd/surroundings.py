"""What a server stands on: the network, the swarm's directory, the clock, and somebody to tell what happens."""

from dataclasses import dataclass
from random import Random

from p2pswarm.core.clock import Clock
from p2pswarm.dht.node import DhtNode
from p2pswarm.directory.announcer import Announcer
from p2pswarm.directory.directory import Directory
from p2pswarm.net.network import Network
from p2pswarm.rpc.client import RpcClient
from swarmd.events import Events
from swarmd.presence import Reach


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The same as long as the process lives, whatever is served."""

    network: Network
    dht: DhtNode
    reach: Reach
    announcer: Announcer
    directory: Directory
    calls: RpcClient
    """To other servers."""
    clock: Clock
    random: Random
    events: Events
