"""A node in a process of its own, for tests that stop or kill it: prints its address, then serves."""

import sys

import trio

from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Stream
from p2pswarm.testing.network_contract import COLLECT, ECHO, HOLD, echo, hold, read_all

STALL_S = 8.0


async def read_late(stream: Stream) -> None:
    """Takes nothing for a while, then everything, and says how much that was."""
    await trio.sleep(STALL_S)
    data = await read_all(stream)
    await stream.write(len(data).to_bytes(8, "big"), data[:1000], data[-1000:])


async def main() -> None:
    async with open_network(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as network:
        network.serve(ECHO, echo)
        network.serve(HOLD, hold)
        network.serve(COLLECT, read_late)
        sys.stdout.write(f"{network.addresses[0]}\n")
        sys.stdout.flush()
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


if __name__ == "__main__":
    trio.run(main)
