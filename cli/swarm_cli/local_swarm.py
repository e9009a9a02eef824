"""A swarm of server processes on this machine, for the demo and the benchmark; stopped with whoever started it.

Each process tells its life as JSON lines on stdout (`swarmd start --json`); the last lines of its stderr are kept for
the error message, should it fail. Its stdin is a pipe of which we hold the other end: when we are killed, it ends too.
"""

import itertools
import json
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from p2pswarm.core.errors import ServerFailed
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from swarm_cli.lines import Lines

STOP_TIMEOUT_S = 15.0
"""For a server to end in order after SIGTERM; then it is killed."""
LINES_KEPT = 15

OnEvent = Callable[["ServerProcess", dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class LocalSwarmPlan:
    """What to start."""

    model: str
    spans: tuple[Span, ...]
    threads: int
    dtype: str = "float32"
    device: str = "cpu"
    quantization: Quantization = Quantization.NONE
    """Not left to the device: what these swarms write is compared with the local model."""
    swarm_key: Path | None = None
    """Of a private swarm; None: open to whoever finds it."""


class ServerProcess:
    """One `swarmd start`."""

    def __init__(self, command: Sequence[str], span: Span) -> None:
        self.command = command
        self.span = span
        self.addresses: tuple[str, ...] = ()
        self.is_ready = False
        self._last_lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._has_addresses = trio.Event()
        self._is_stopping = False

    async def run(self, on_event: OnEvent, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs the process until cancelled, reports when it is ready. Raises `ServerFailed` when it ends by itself."""
        process = await trio.lowlevel.open_process(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_lines, process.stderr)
                async for line in Lines(process.stdout):
                    event = json.loads(line)
                    self._note(event)
                    on_event(self, event)
                    if event["event"] == "ready":
                        task_status.started()
            status = await process.wait()
            raise ServerFailed(
                f"the server of blocks {self.span} ended with status {status}; its last lines:\n{self.log}"
            )
        finally:
            await _stop(process)

    async def wait_for_addresses(self) -> tuple[str, ...]:
        """Where others can join; known some time before the server is ready."""
        await self._has_addresses.wait()
        return self.addresses

    @property
    def log(self) -> str:
        """The last lines the process wrote to stderr."""
        return "\n".join(f"  {line}" for line in self._last_lines) or "  (it wrote none)"

    def _note(self, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            self.is_ready = True
        if event["event"] == "error":
            self._last_lines.append(str(event.get("message")))
        if "addresses" in event:
            self.addresses = tuple(event["addresses"])
            self._has_addresses.set()

    async def _keep_lines(self, stream: trio.abc.ReceiveStream) -> None:
        async for line in Lines(stream):
            self._last_lines.append(line)


async def _stop(process: trio.Process) -> None:
    """Ends the process in order, or kills it; never leaves it behind."""
    with trio.CancelScope(shield=True):
        if process.poll() is None:
            process.terminate()
            with trio.move_on_after(STOP_TIMEOUT_S):
                await process.wait()
        if process.poll() is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def local_swarm(
    plan: LocalSwarmPlan, on_event: OnEvent = lambda server, event: None
) -> AsyncIterator[list[ServerProcess]]:
    """Servers that are ready, one for each span, until the context is left.

    Raises `ServerFailed` with a server's last lines when one ends too early, even after it was ready.
    """
    with TemporaryDirectory(prefix="swarm-") as folder:
        try:
            async with trio.open_nursery() as nursery:
                servers = [ServerProcess(_command(plan, span, Path(folder)), span) for span in plan.spans]
                await _start(servers, on_event, nursery)
                yield servers
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            failed, _ = group.split(ServerFailed)
            raise _first(failed if failed is not None else group) from None


async def _start(servers: Sequence[ServerProcess], on_event: OnEvent, nursery: trio.Nursery) -> None:
    """Starts the first server, the others as soon as it can be joined, and waits until all are ready."""
    async with trio.open_nursery() as starting:
        first, *others = servers
        starting.start_soon(nursery.start, first.run, on_event)
        peers = await first.wait_for_addresses()
        for server in others:
            server.command = [*server.command, "--peers", *peers]
            starting.start_soon(nursery.start, server.run, on_event)


def _command(plan: LocalSwarmPlan, span: Span, folder: Path) -> list[str]:
    options = {
        "--blocks": str(span),
        "--host": "127.0.0.1",
        "--identity": str(folder / f"identity-{span.start}"),
        "--dtype": plan.dtype,
        "--quant": plan.quantization.value,
        "--device": plan.device,
        "--threads": str(plan.threads),
        "--name": f"local-{span.start}-{span.end}",
    }
    if plan.swarm_key is not None:
        options["--swarm-key"] = str(plan.swarm_key)
    flags = [word for name, value in options.items() for word in (name, value)]
    return [sys.executable, "-m", "swarmd", "start", plan.model, "--json", "--stop-with-stdin", *flags]


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def split_evenly(num_blocks: int, num_servers: int) -> tuple[Span, ...]:
    """Spans of nearly equal length, in order; no more of them than blocks."""
    num_servers = min(num_servers, num_blocks)
    edges = [num_blocks * index // num_servers for index in range(num_servers + 1)]
    return tuple(Span(start, end) for start, end in itertools.pairwise(edges))
