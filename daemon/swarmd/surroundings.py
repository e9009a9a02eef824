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


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Lives as long as the process; what is served may change meanwhile."""

    network: Network
    dht: DhtNode
    announcer: Announcer
    calls: RpcClient
    """To other servers."""
    clock: Clock
    random: Random
    events: Events

    @property
    def directory(self) -> Directory:
        return Directory(self.dht, self.clock, self.random)
