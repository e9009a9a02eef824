"""The relay and the server that are measured, each a process of its own.

The server listens, so that it can be dialled directly too, and holds a reservation on the relay. Each prints its
addresses, and the CPU seconds it has used whenever a line comes on its standard input.
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from p2pswarm.core.clock import SystemClock
from p2pswarm.net.addresses import join_peer_address
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.nat.relay import Relay
from p2pswarm.net.nat.relay_limits import RelayLimits
from p2pswarm.net.nat.reservation import reserve
from simulations.transport.peers import ECHO, SINK, StreamChannel, echo, sink

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
RELAYED = NetworkConfig(punch_holes=False)
"""A circuit stays one, though both ends could be dialled."""
UNPACED = RelayLimits(circuit_s=None, circuit_bytes=None, rate_bytes_per_s=None)
"""What is asked is what a relay can do, not what it would give a stranger."""


@asynccontextmanager
async def relay() -> AsyncIterator[str]:
    async with open_network(Identity.generate(), listen=[LOOPBACK]) as network:
        Relay(network, SystemClock(), UNPACED).serve()
        yield network.addresses[0]


@asynccontextmanager
async def server(relay_address: str) -> AsyncIterator[str]:
    """Its direct address and the one through the relay."""
    async with (
        open_network(Identity.generate(), listen=[LOOPBACK], config=RELAYED) as network,
        trio.open_nursery() as nursery,
    ):
        network.serve(ECHO, lambda stream: echo(StreamChannel(stream)))
        network.serve(SINK, lambda stream: sink(StreamChannel(stream)))
        reservation = await reserve(network, await network.connect(relay_address))
        nursery.start_soon(reservation.hold)
        yield f"{network.addresses[0]} {join_peer_address(reservation.addresses[0], network.peer_id)}"
        nursery.cancel_scope.cancel()


async def run(*relay_address: str) -> None:
    async with server(*relay_address) if relay_address else relay() as addresses:
        print(addresses, flush=True)
        while await trio.to_thread.run_sync(sys.stdin.readline):
            times = os.times()
            print(times.user + times.system, flush=True)


if __name__ == "__main__":
    trio.run(run, *sys.argv[1:])
