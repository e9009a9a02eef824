"""What does a relay cost: how much longer is a round trip through it, and how much less goes through?

Method: three processes over loopback, a relay without a limit of rate, a server that can be dialled and holds a
reservation on it, and a client (this process) with a stream to the server either way. Rounds are interleaved, so that
a slow minute of the machine slows both; the medians over rounds are compared. A round trip is one request of 2.3 KiB
(a decode step of a 576-wide model) and its echo; bulk is 64 MiB in chunks of 1 MiB, timed until the last is
acknowledged; CPU is that of client and server together, and of the relay alone.

    python -m simulations.relay.run [--rounds 5] [--json]

Exits 1 when a target is missed: round trip at most 3x the direct one, bandwidth at least a third.
"""

import argparse
import json
import statistics
import sys
from contextlib import AsyncExitStack

import trio

from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from simulations.relay.peers import RELAYED
from simulations.transport.peers import ECHO, SINK, StreamChannel
from simulations.transport.run import CHUNK_BYTES, Measurements, Transport, run_server

MAX_ROUND_TRIP_RATIO = 3.0
MIN_BANDWIDTH_RATIO = 1 / 3
PATHS = ("direct", "relayed")


async def measure(rounds: int, num_requests: int, num_mebibytes: int) -> dict[str, dict[str, float]]:
    """The medians of either path, and the relay's CPU seconds a GiB."""
    module = [sys.executable, "-m", "simulations.relay.peers"]
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        relay = Transport("relay", await nursery.start(run_server, module))
        server = await nursery.start(run_server, [*module, await relay.server_line()])
        addresses = (await Transport("server", server).server_line()).split()
        transports = []
        for name, address in zip(PATHS, addresses, strict=True):
            network = await stack.enter_async_context(open_network(Identity.generate(), config=RELAYED))
            peer_id = await network.connect(address)
            transport = Transport(name, server)
            transport.echo = StreamChannel(await network.open_stream(peer_id, ECHO))
            transport.sink = StreamChannel(await network.open_stream(peer_id, SINK))
            await transport.sink.write(CHUNK_BYTES.to_bytes(8, "big"))
            transports.append(transport)
        relay_cpu_s_per_gib = []
        for round_number in range(rounds + 1):
            for transport in transports:
                if round_number == 1:
                    transport.results = Measurements()  # the round before only warmed up
                await transport.measure_round_trips(num_requests)
                cpu_before_s = await relay.server_cpu_s()
                await transport.measure_bulk(num_mebibytes)
                cpu_s = await relay.server_cpu_s() - cpu_before_s
            relay_cpu_s_per_gib.append(cpu_s * 1024 / num_mebibytes)
        medians = {transport.name: transport.results.medians() for transport in transports}
        medians["relay"] = {"cpu_s_per_gib": statistics.median(relay_cpu_s_per_gib[1:])}
        await stack.aclose()
        nursery.cancel_scope.cancel()
    return medians


def ratios(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """Relayed over direct."""
    direct, relayed = medians["direct"], medians["relayed"]
    return {
        "round_trip": relayed["round_trip_us"] / direct["round_trip_us"],
        "bandwidth": relayed["bandwidth_mib_per_s"] / direct["bandwidth_mib_per_s"],
    }


def meets_targets(found: dict[str, float]) -> bool:
    return found["round_trip"] <= MAX_ROUND_TRIP_RATIO and found["bandwidth"] >= MIN_BANDWIDTH_RATIO


def table(medians: dict[str, dict[str, float]], found: dict[str, float]) -> str:
    lines = [f"{'path':<18}{'round trip us':>15}{'bulk MiB/s':>12}{'CPU s/GiB':>11}"]
    for name in PATHS:
        row = medians[name]
        lines.append(
            f"{name:<18}{row['round_trip_us']:>15.0f}{row['bandwidth_mib_per_s']:>12.0f}{row['cpu_s_per_gib']:>11.2f}"
        )
    lines.append(f"{'relay itself':<18}{'':>15}{'':>12}{medians['relay']['cpu_s_per_gib']:>11.2f}")
    lines.append(f"{'relayed / direct':<18}{found['round_trip']:>15.2f}{found['bandwidth']:>12.2f}")
    lines.append(f"{'target':<18}{'<= 3.00':>15}{'>= 0.33':>12}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a path through a relay with the direct one.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=800, help="round trips per round")
    parser.add_argument("--mebibytes", type=int, default=64, help="bulk data per round")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    medians = trio.run(measure, arguments.rounds, arguments.requests, arguments.mebibytes)
    found = ratios(medians)
    if arguments.json:
        targets = {"round_trip": MAX_ROUND_TRIP_RATIO, "bandwidth": MIN_BANDWIDTH_RATIO}
        print(json.dumps({"medians": medians, "ratios": found, "targets": targets, "met": meets_targets(found)}))
    else:
        print(table(medians, found))
    return 0 if meets_targets(found) else 1


if __name__ == "__main__":
    sys.exit(main())
