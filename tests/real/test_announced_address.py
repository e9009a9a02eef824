"""A node behind a forwarded port is reached where it announces. The tests' own delay proxy forwards, and is held to its
delay here.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import trio
from delay_proxy import HOST, Delay, delay_proxies, delay_proxy
from delayed_swarm import free_ports

from p2pswarm.core.clock import SystemClock
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.node import DhtNode
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity

pytestmark = pytest.mark.real

ONE_WAY_S = 0.05
NUM_MESSAGES = 20


async def test_what_goes_through_a_delay_proxy_comes_back_whole_in_order_and_two_ways_later() -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    sent = [bytes([index]) * (1 << index % 17) for index in range(NUM_MESSAGES)]
    async with trio.open_nursery() as nursery:
        listener, *_ = await nursery.start(trio.serve_tcp, echo, 0)
        port = await nursery.start(delay_proxy, listener.socket.getsockname()[1], Delay(ONE_WAY_S))
        async with await trio.open_tcp_stream(HOST, port) as stream:
            began_s = trio.current_time()
            for message in sent:
                await stream.send_all(message)
            await stream.send_eof()
            received = await stream.receive_some()
            first_after_s = trio.current_time() - began_s
            async for data in stream:
                received += data
            all_after_s = trio.current_time() - began_s
        nursery.cancel_scope.cancel()
    assert received == b"".join(sent)
    assert first_after_s >= 2 * ONE_WAY_S
    assert all_after_s < NUM_MESSAGES * ONE_WAY_S, "each message waited for the one before"


async def test_a_node_tells_the_swarm_the_address_that_it_announces(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    async with delay_proxies([port]) as proxies:
        announced = f"/ip4/{HOST}/tcp/{proxies.ports[0]}"
        with bootstrap_process(
            "--port", str(port), "--announce", announced, "--identity", str(tmp_path / "key")
        ) as node:
            (address,) = await trio.to_thread.run_sync(ready_addresses, node)
            assert address.startswith(f"{announced}/p2p/")
            async with open_network(Identity.generate()) as network, trio.open_nursery() as nursery:
                client = DhtNode(network, SystemClock(), Random(), DhtConfig(serve=False))
                await nursery.start(client.run)
                await client.bootstrap([address])
                assert [contact.addresses for contact in client.known_contacts()] == [(address,)]
                nursery.cancel_scope.cancel()


@contextmanager
def bootstrap_process(*flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "swarmd", "bootstrap", "--json", "--host", HOST, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def ready_addresses(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    events = map(json.loads, process.stdout)
    return next(event["addresses"] for event in events if event["event"] == "ready")
