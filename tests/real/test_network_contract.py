"""The real network, on loopback, keeps the contract of every network."""

from contextlib import AbstractAsyncContextManager

import pytest

from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Network
from p2pswarm.testing.network_contract import CONTRACT, Check, Nodes, cancel_reads, cancel_writes, open_many_streams

pytestmark = pytest.mark.real


def open_node(host: str = "/ip4/127.0.0.1") -> AbstractAsyncContextManager[Network]:
    return open_network(Identity.generate(), listen=[f"{host}/tcp/0"])


NODES = Nodes(open_node, longest_wait_s=0.004)


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
async def test_real_network_keeps_the_contract(check: Check) -> None:
    await check(NODES)


async def test_a_thousand_cancelled_reads_lose_nothing() -> None:
    await cancel_reads(NODES, num_cancellations=1000, seed=21)


async def test_a_thousand_cancelled_writes_harm_no_other_stream() -> None:
    await cancel_writes(NODES, num_cancellations=1000, seed=22)


async def test_a_thousand_streams_are_open_at_once() -> None:
    await open_many_streams(NODES, num_streams=1000)


async def test_the_contract_holds_over_ipv6() -> None:
    nodes = Nodes(lambda: open_node("/ip6/::1"), longest_wait_s=0.004)
    for check in CONTRACT[:5]:
        await check(nodes)
