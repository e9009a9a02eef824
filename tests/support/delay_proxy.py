"""A TCP proxy that makes links long: what goes in comes out a `Delay` later, in each direction of each connection.

In a trio program: `port = await nursery.start(delay_proxy, target_port, Delay(0.05))`. As a process of its own, which
keeps time while a test computes: `async with delay_proxies([4001, 4002]) as proxies`. On loopback only; knows nothing
of what goes through it.
"""

import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import trio

HOST = "127.0.0.1"
CHUNK_BYTES = 1 << 18
MAX_CHUNKS_UNDER_WAY = 1024
"""In one direction of one connection; beyond that the sender waits, as on any link."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Delay:
    """One way. May be changed at any time, for what goes in from then on."""

    seconds: float = 0.0


async def delay_proxy(
    target_port: int, delay: Delay, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    """Leads every connection to `target_port`, until cancelled; reports the port where it listens."""

    async def lead(client: trio.SocketStream) -> None:
        try:
            async with await trio.open_tcp_stream(HOST, target_port) as target, trio.open_nursery() as directions:
                directions.start_soon(_carry, client, target, delay)
                directions.start_soon(_carry, target, client, delay)
        except* (OSError, trio.BrokenResourceError) as lost:
            logger.debug("a connection to port %d ended: %s", target_port, lost.exceptions)

    (listener,) = await trio.open_tcp_listeners(0, host=HOST)
    task_status.started(listener.socket.getsockname()[1])
    await trio.serve_listeners(lead, [listener])


async def _carry(source: trio.SocketStream, sink: trio.SocketStream, delay: Delay) -> None:
    """One direction, to its end."""
    enter, leave = trio.open_memory_channel[tuple[float, bytes]](MAX_CHUNKS_UNDER_WAY)

    async def let_out() -> None:
        async for due_at_s, data in leave:
            await trio.sleep_until(due_at_s)
            await sink.send_all(data)
        await sink.send_eof()

    async with trio.open_nursery() as nursery, enter:
        nursery.start_soon(let_out)
        while data := await source.receive_some(CHUNK_BYTES):
            await enter.send((trio.current_time() + delay.seconds, data))


@dataclass(frozen=True, slots=True)
class DelayProxies:
    """A process with one proxy for each target; all have the same delay, 0 at first."""

    ports: tuple[int, ...]
    """Where to connect instead, in the order of the targets."""
    _process: trio.Process

    async def set_delay(self, delay_s: float) -> None:
        """In force when this returns."""
        assert self._process.stdin is not None
        await self._process.stdin.send_all(f"{delay_s!r}\n".encode())
        assert await _answer(self._process) == delay_s


@asynccontextmanager
async def delay_proxies(target_ports: Sequence[int]) -> AsyncIterator[DelayProxies]:
    """Proxies to ports where, perhaps, nobody listens yet."""
    command = [sys.executable, __file__, *map(str, target_ports)]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process: trio.Process = await nursery.start(run)
        ports = await _answer(process)
        assert isinstance(ports, list)
        yield DelayProxies(tuple(ports), process)
        nursery.cancel_scope.cancel()


async def _answer(process: trio.Process) -> object:
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        data = await process.stdout.receive_some()
        assert data, "the delay proxies ended by themselves"
        line += data
    return json.loads(line)


async def main(target_ports: Sequence[int]) -> None:
    """Prints the ports, then each new delay that a line of stdin set; ends with stdin."""
    delay = Delay()
    async with trio.open_nursery() as nursery:
        ports = [await nursery.start(delay_proxy, port, delay) for port in target_ports]
        print(json.dumps(ports), flush=True)  # noqa: T201
        async for line in trio.wrap_file(sys.stdin):
            delay.seconds = float(line)
            print(json.dumps(delay.seconds), flush=True)  # noqa: T201
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, [int(port) for port in sys.argv[1:]])
