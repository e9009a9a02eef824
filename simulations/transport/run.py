"""How much faster is our muxer and noise session than py-libp2p's own, on the same machine in the same minute?

Method: for each transport a server process and a client (this process), over loopback, one stream. Rounds are
interleaved, so that a slow minute of the machine slows all of them; the medians over rounds are compared. A round
trip is one request of 2.3 KiB (a decode step of a 576-wide model) and its echo; bulk is 64 MiB in chunks of 1 MiB,
timed until the last is acknowledged; CPU is that of both processes together.

    python -m simulations.transport.run [--rounds 5] [--json]

Exits 1 when a target is missed: round trip at most 0.45x of noise+yamux, bandwidth at least 2x, CPU a GiB at most 0.5x.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field

import trio

from simulations.transport.peers import CLIENTS, ECHO, SINK, Channel

REQUEST_BYTES = 2355
CHUNK_BYTES = 1 << 20
MEBIBYTE = 1 << 20
TARGETS = {"round_trip": 0.45, "bandwidth": 2.0, "cpu": 0.5}


@dataclass
class Measurements:
    """One value per round."""

    round_trip_us: list[float] = field(default_factory=list)
    bandwidth_mib_per_s: list[float] = field(default_factory=list)
    cpu_s_per_gib: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in asdict(self).items()}


class Transport:
    """One transport under test: its server process, and open streams to it."""

    def __init__(self, name: str, server: trio.Process) -> None:
        self.name = name
        self.results = Measurements()
        self._server = server
        self.echo: Channel
        self.sink: Channel

    async def server_line(self) -> str:
        assert self._server.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            more = await self._server.stdout.receive_some(10_000)
            assert more, f"the server of {self.name} has ended"
            line += more
        return line.decode().strip()

    async def cpu_s(self) -> float:
        """CPU seconds of client and server so far."""
        times = os.times()
        return await self.server_cpu_s() + times.user + times.system

    async def server_cpu_s(self) -> float:
        assert self._server.stdin is not None
        await self._server.stdin.send_all(b"\n")
        return float(await self.server_line())

    async def measure_round_trips(self, num_requests: int) -> None:
        request = bytes(REQUEST_BYTES)
        durations_s = []
        for _ in range(num_requests):
            started_s = time.perf_counter()
            await self.echo.write(request)
            num_received = 0
            while num_received < REQUEST_BYTES:
                num_received += len(await self.echo.read(REQUEST_BYTES - num_received))
            durations_s.append(time.perf_counter() - started_s)
        self.results.round_trip_us.append(statistics.median(durations_s) * 1e6)

    async def measure_bulk(self, num_mebibytes: int) -> None:
        chunk = bytes(CHUNK_BYTES)
        cpu_before_s, started_s = await self.cpu_s(), time.perf_counter()

        async def send() -> None:
            for _ in range(num_mebibytes):
                await self.sink.write(chunk)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            num_acknowledged = 0
            while num_acknowledged < num_mebibytes:
                num_acknowledged += len(await self.sink.read(1000))
        duration_s = time.perf_counter() - started_s
        cpu_s = await self.cpu_s() - cpu_before_s
        self.results.bandwidth_mib_per_s.append(num_mebibytes * CHUNK_BYTES / MEBIBYTE / duration_s)
        self.results.cpu_s_per_gib.append(cpu_s * 1024 / num_mebibytes)


async def measure(rounds: int, num_requests: int, num_mebibytes: int) -> dict[str, dict[str, float]]:
    """The medians of each transport."""
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        transports = []
        for name, open_client in CLIENTS.items():
            command = [sys.executable, "-m", "simulations.transport.peers", name]
            server = await nursery.start(run_server, command)
            transport = Transport(name, server)
            open_channel = await stack.enter_async_context(open_client(await transport.server_line()))
            transport.echo = await open_channel(ECHO)
            transport.sink = await open_channel(SINK)
            await transport.sink.write(CHUNK_BYTES.to_bytes(8, "big"))
            transports.append(transport)
        for round_number in range(rounds + 1):
            for transport in transports:
                if round_number == 1:
                    transport.results = Measurements()  # the round before only warmed up
                await transport.measure_round_trips(num_requests)
                await transport.measure_bulk(num_mebibytes)
        medians = {transport.name: transport.results.medians() for transport in transports}
        await stack.aclose()
        nursery.cancel_scope.cancel()
    return medians


async def run_server(command: list[str], task_status: trio.TaskStatus[trio.Process]) -> None:
    await trio.run_process(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        check=False,
        task_status=task_status,
    )


def ratios(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ours over stock noise+yamux."""
    ours, stock = medians["ours"], medians["noise+yamux"]
    return {
        "round_trip": ours["round_trip_us"] / stock["round_trip_us"],
        "bandwidth": ours["bandwidth_mib_per_s"] / stock["bandwidth_mib_per_s"],
        "cpu": ours["cpu_s_per_gib"] / stock["cpu_s_per_gib"],
    }


def meets_targets(found: dict[str, float]) -> bool:
    return (
        found["round_trip"] <= TARGETS["round_trip"]
        and found["bandwidth"] >= TARGETS["bandwidth"]
        and found["cpu"] <= TARGETS["cpu"]
    )


def table(medians: dict[str, dict[str, float]], found: dict[str, float]) -> str:
    lines = [f"{'transport':<14}{'round trip us':>15}{'bulk MiB/s':>12}{'CPU s/GiB':>11}"]
    lines += [
        f"{name:<14}{row['round_trip_us']:>15.0f}{row['bandwidth_mib_per_s']:>12.0f}{row['cpu_s_per_gib']:>11.2f}"
        for name, row in medians.items()
    ]
    lines.append(f"{'ours / stock':<14}{found['round_trip']:>15.2f}{found['bandwidth']:>12.2f}{found['cpu']:>11.2f}")
    lines.append(f"{'target':<14}{'<= 0.45':>15}{'>= 2.00':>12}{'<= 0.50':>11}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare our transport with stock noise+yamux and bare TCP.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=800, help="round trips per round")
    parser.add_argument("--mebibytes", type=int, default=64, help="bulk data per round")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    medians = trio.run(measure, arguments.rounds, arguments.requests, arguments.mebibytes)
    found = ratios(medians)
    if arguments.json:
        print(json.dumps({"medians": medians, "ratios": found, "targets": TARGETS, "met": meets_targets(found)}))
    else:
        print(table(medians, found))
    return 0 if meets_targets(found) else 1


if __name__ == "__main__":
    sys.exit(main())
