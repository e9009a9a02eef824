"""Clients that a benchmark runs at the same time: sessions of this process, or processes of their own.

Each takes its prompt and its first token, waits for all others to have done so, and then decodes. A process is
`swarm_cli/benchmarks/client_process.py`; what goes to it and what comes from it are JSON lines. All times are those of
`time.perf_counter`, which one machine's processes share.
"""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import trio

from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.core.errors import ServerFailed
from swarm_cli.benchmarks.generating import TokenTimes, exactly
from swarm_cli.benchmarks.setting import Setting
from swarm_cli.lines import Lines

UntilAllAreReady = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Task:
    """What a client has to do."""

    prompt_ids: list[int]
    new_tokens: int
    """Decoded after the first one."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What it got."""

    token_ids: list[int]
    """The first one, which the prompt's prefill gives, included."""
    came_at_s: list[float]
    """The decoded ones."""


class Client(Protocol):
    """Decodes one task after the other."""

    async def decode(self, task: Task, until_all_are_ready: UntilAllAreReady) -> Decoded: ...


class SessionClient:
    """A client in this process: all of them share one model's embeddings and head."""

    def __init__(self, model: DistributedModel) -> None:
        self._model = model

    async def decode(self, task: Task, until_all_are_ready: UntilAllAreReady) -> Decoded:
        async with self._model.session(max_length=len(task.prompt_ids) + 1 + task.new_tokens) as session:
            first = await session.complete(task.prompt_ids, **exactly(1))
            await until_all_are_ready()
            times = TokenTimes()
            await session.complete(streamer=times, **exactly(task.new_tokens))
        return Decoded([int(first[0, -1]), *times.token_ids], times.came_at_s)


class ClientProcess:
    """A client in a process of its own, with embeddings and head of its own; made by `open_client_processes`."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin = process.stdin
        self._process = process
        self._lines = Lines(process.stdout)

    async def decode(self, task: Task, until_all_are_ready: UntilAllAreReady) -> Decoded:
        await self.tell(asdict(task))
        await self.hear()
        await until_all_are_ready()
        await self.tell({})
        return Decoded(**await self.hear())

    async def tell(self, message: dict[str, Any]) -> None:
        await self._stdin.send_all(json.dumps(message).encode() + b"\n")

    async def hear(self) -> dict[str, Any]:
        """The next message. Raises `ServerFailed` when the process has ended; why is on stderr."""
        async for line in self._lines:
            message: dict[str, Any] = json.loads(line)
            return message
        raise ServerFailed(f"a client process ended with status {await self._process.wait()}")


@asynccontextmanager
async def open_client_processes(setting: Setting, num_clients: int) -> AsyncIterator[list[Client]]:
    """So many processes that have loaded the model and joined the swarm; they end with the context."""
    command = [sys.executable, "-m", "swarm_cli.benchmarks.client_process"]
    processes: list[trio.Process] = []
    try:
        for _ in range(num_clients):
            opened = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            processes.append(opened)
        clients = [ClientProcess(process) for process in processes]
        terms = {
            "model": setting.model_path,
            "peers": setting.peers,
            "dtype": setting.dtype,
            "threads": setting.threads,
            "local_blocks": setting.local_blocks,
        }
        for client in clients:
            await client.tell(terms)
        for client in clients:
            await client.hear()
        yield list(clients)
    finally:
        with trio.CancelScope(shield=True):
            for process in processes:
                process.kill()
                await process.wait()
