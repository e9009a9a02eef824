"""Server processes that can be killed, stopped and started again, several for each span of a model.

Each keeps its identity over its lives, as a server does whose operator restarts it. Beside `swarm_cli/local_swarm.py`,
whose servers are to live as long as their swarm, these are expected to die.
"""

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from p2pswarm.core.errors import ServerFailed
from p2pswarm.core.ids import PeerId
from p2pswarm.core.span import Span

READY_TIMEOUT_S = 120.0
"""Six servers that start at once on two cores need about a third of it."""
LINES_KEPT = 15


@dataclass(frozen=True, slots=True)
class ReplicasPlan:
    """What to start."""

    model: str
    spans: tuple[Span, ...]
    num_replicas: int = 2
    threads: int = 1


class Replica:
    """One server, over all its lives."""

    def __init__(self, name: str, span: Span, command: Sequence[str]) -> None:
        self.name = name
        self.span = span
        self.peer_id: PeerId | None = None
        """None before it was ready for the first time."""
        self.addresses: tuple[str, ...] = ()
        self.is_ready = False
        self.num_lives = 0
        self._command = tuple(command)
        self._process: trio.Process | None = None
        self._last_lines: deque[str] = deque(maxlen=LINES_KEPT)

    async def live(
        self, peers: Sequence[str], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Runs a process until it is killed or this is cancelled; reports when it is ready.

        Raises `ServerFailed` when the process ends by itself.
        """
        arguments = [*self._command, "--peers", *peers] if peers else self._command
        process = await trio.lowlevel.open_process(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._process = process
        self.num_lives += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_lines, process.stderr)
                await self._follow(process.stdout, task_status)
            if await process.wait() != -signal.SIGKILL:
                raise ServerFailed(
                    f"{self.name} ended with status {process.returncode}:\n" + "\n".join(self._last_lines)
                )
        finally:
            self.is_ready = False
            with trio.CancelScope(shield=True):
                if process.poll() is None:
                    process.kill()
                await process.wait()

    def kill(self) -> None:
        """Ends the process with SIGKILL: it cannot say goodbye."""
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """Stops the process with SIGSTOP: its connections stay open, and nobody answers."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Lets a paused process go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self.is_ready = number is signal.SIGCONT
        os.kill(self._process.pid, number)

    async def _follow(self, stdout: trio.abc.ReceiveStream | None, task_status: trio.TaskStatus[None]) -> None:
        async for line in _lines(stdout):
            event = json.loads(line)
            if event["event"] == "error":
                self._last_lines.append(str(event.get("message")))
            if event["event"] == "ready":
                self.peer_id, self.addresses = PeerId(event["peer_id"]), tuple(event["addresses"])
                self.is_ready = True
                task_status.started()

    async def _keep_lines(self, stderr: trio.abc.ReceiveStream | None) -> None:
        async for line in _lines(stderr):
            self._last_lines.append(line)


class Replicas:
    """All servers of a swarm; those that were killed can be started again."""

    def __init__(self, replicas: Sequence[Replica], nursery: trio.Nursery) -> None:
        self.all = tuple(replicas)
        self._nursery = nursery

    @property
    def addresses(self) -> list[str]:
        """Where the servers that are ready can be reached."""
        return [address for replica in self.all if replica.is_ready for address in replica.addresses]

    def __getitem__(self, peer_id: PeerId) -> Replica:
        return next(replica for replica in self.all if replica.peer_id == peer_id)

    async def start(self, replica: Replica) -> None:
        """Starts the replica; returns when it is ready."""
        with trio.fail_after(READY_TIMEOUT_S):
            await self._nursery.start(replica.live, self.addresses)

    async def until_all_ready(self) -> None:
        with trio.fail_after(READY_TIMEOUT_S):
            while not all(replica.is_ready for replica in self.all):  # noqa: ASYNC110 - they announce it to nobody here
                await trio.sleep(0.1)


@asynccontextmanager
async def open_replicas(plan: ReplicasPlan) -> AsyncIterator[Replicas]:
    """The plan's servers, all ready; no process is left when the context is."""
    with TemporaryDirectory(prefix="failover-") as folder:
        async with trio.open_nursery() as nursery:
            replicas = Replicas(
                [
                    _replica(plan, span, number, Path(folder))
                    for number in range(plan.num_replicas)
                    for span in plan.spans
                ],
                nursery,
            )
            first, *others = replicas.all
            await replicas.start(first)
            async with trio.open_nursery() as starting:
                for replica in others:
                    starting.start_soon(replicas.start, replica)
            try:
                yield replicas
            finally:
                nursery.cancel_scope.cancel()


def _replica(plan: ReplicasPlan, span: Span, number: int, folder: Path) -> Replica:
    name = f"{span}-{'abcdefgh'[number]}"
    options = {
        "--blocks": str(span),
        "--host": "127.0.0.1",
        "--identity": str(folder / f"{span.start}-{number}.key"),
        "--dtype": "float32",
        "--device": "cpu",
        "--threads": str(plan.threads),
        "--name": name,
    }
    flags = [word for option, value in options.items() for word in (option, value)]
    return Replica(name, span, [sys.executable, "-m", "swarmd", "start", plan.model, "--json", *flags])


async def _lines(stream: trio.abc.ReceiveStream | None) -> AsyncIterator[str]:
    assert stream is not None
    unfinished = b""
    async for data in stream:
        *whole, unfinished = (unfinished + data).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
