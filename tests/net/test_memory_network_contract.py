"""The simulated network keeps the contract of every network."""

import random
from contextlib import AbstractAsyncContextManager
from itertools import count

import pytest
from trio.testing import MockClock

from p2pswarm.net.network import Network
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.testing.network_contract import CONTRACT, Check, Nodes

LINKS = {
    "fast": Link(latency_s=0.001, bandwidth_bytes_per_s=1e9),
    "ordinary": Link(latency_s=0.025, bandwidth_bytes_per_s=10e6),
    "lossy": Link(latency_s=0.05, loss=0.0005),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
async def test_memory_network_keeps_the_contract(check: Check, link: str, autojump_clock: MockClock) -> None:
    memory = MemoryNetwork(random.Random(11), LINKS[link])
    seeds = count(1)

    def open_node() -> AbstractAsyncContextManager[Network]:
        return memory.node(next(seeds))

    await check(Nodes(open_node, longest_wait_s=2 * LINKS[link].round_trip_s))
