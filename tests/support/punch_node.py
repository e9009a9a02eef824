"""Three nodes as programs, for tests of hole punching between real routers; each tells JSON lines.

punch_node.py relay IP                     listens there; tells its address
punch_node.py called RELAY                 cannot be dialled, takes a place on the relay; tells its addresses
punch_node.py caller ADDRESS SECONDS       talks to it, over one stream, for so long; tells the path as it changes
"""

import json
import statistics
import sys
from random import Random

import trio

from p2pswarm.core.clock import SystemClock
from p2pswarm.core.ids import ProtocolId
from p2pswarm.net.addresses import join_peer_address
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.nat.probing import Probing
from p2pswarm.net.nat.relay import Relay
from p2pswarm.net.nat.reservation import reserve
from p2pswarm.net.network import Network, Stream

ECHO = ProtocolId("/test/echo/1")
MESSAGE_BYTES = 3000


def tell(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


async def be_relay(ip: str) -> None:
    async with open_network(Identity.generate(), listen=[f"/ip4/{ip}/tcp/0"]) as network:
        Relay(network, SystemClock()).serve()
        Probing(network).serve()
        tell(addresses=network.addresses)
        await trio.sleep_forever()


async def be_called(relay_address: str) -> None:
    async with open_network(Identity.generate(), listen=["/ip4/0.0.0.0/tcp/0"]) as network:
        network.serve(ECHO, echo)
        reservation = await reserve(network, await network.connect(relay_address))
        tell(addresses=[join_peer_address(address, network.peer_id) for address in reservation.addresses])
        await reservation.hold()


async def be_caller(address: str, duration_s: float) -> None:
    async with open_network(Identity.generate()) as network:
        peer_id = await network.connect(address)
        stream = await network.open_stream(peer_id, ECHO)
        began_s = trio.current_time()
        round_trips_s: dict[bool, list[float]] = {False: [], True: []}
        was_direct = None
        randomness = Random(1)
        while trio.current_time() - began_s < duration_s:
            is_direct = is_direct_now(network, peer_id)
            if is_direct != was_direct:
                tell(is_direct=is_direct, after_s=trio.current_time() - began_s)
                was_direct = is_direct
            sent_s = trio.current_time()
            message = randomness.randbytes(MESSAGE_BYTES)
            await stream.write(message)
            assert await read_exactly(stream, MESSAGE_BYTES) == message
            round_trips_s[is_direct].append(trio.current_time() - sent_s)
        tell(
            num_messages=sum(map(len, round_trips_s.values())),
            median_round_trips_s=[statistics.median(found) for found in round_trips_s.values() if found],
            longest_round_trip_s=max(max(found) for found in round_trips_s.values() if found),
        )


def is_direct_now(network: Network, peer_id: str) -> bool:
    path = network.path(peer_id)
    return path is not None and path.is_direct


async def read_exactly(stream: Stream, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        more = await stream.read(num_bytes - len(data))
        assert more, "the stream ended"
        data += more
    return data


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["relay", ip]:
            trio.run(be_relay, ip)
        case ["called", relay_address]:
            trio.run(be_called, relay_address)
        case ["caller", address, seconds]:
            trio.run(be_caller, address, float(seconds))
