"""The processes of an attack: the server that is attacked, and the attacker."""

import json
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import trio

START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Victim:
    """A server, and what can be seen of it from outside."""

    process: psutil.Process
    ready: dict[str, Any]
    """Its event of that name."""

    @property
    def address(self) -> str:
        return str(self.ready["addresses"][0])

    def memory_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    def num_sockets(self) -> int:
        """Listening ones among them."""
        return len(self.process.net_connections("tcp"))


@asynccontextmanager
async def open_victim(model: str, flags: Sequence[str]) -> AsyncIterator[Victim]:
    """A server of all blocks, on a port of its own, with one thread and these flags besides."""
    with TemporaryDirectory(prefix="abuse-") as folder:
        own = ["--host", "127.0.0.1", "--identity", str(Path(folder) / "key"), "--threads", "1", "--json"]
        command = [sys.executable, "-m", "swarmd", "start", model, *own, *flags]
        async with _running(command) as process, aclosing(_lines(process)) as lines:
            async for line in lines:
                event = json.loads(line)
                if event["event"] == "ready":
                    break
            yield Victim(psutil.Process(process.pid), event)


@asynccontextmanager
async def attacked(name: str, victim: Victim) -> AsyncIterator[None]:
    """Within, the attack of that name goes on."""
    command = [sys.executable, "-m", "simulations.abuse.attack_process", name, json.dumps(victim.ready)]
    async with _running(command) as process, aclosing(_lines(process)) as lines:
        assert await anext(lines) == b"begun"
        yield


@asynccontextmanager
async def _running(command: Sequence[str]) -> AsyncIterator[trio.Process]:
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()


async def _lines(process: trio.Process) -> AsyncGenerator[bytes, None]:
    """What the process prints. Raises `trio.TooSlowError` when the next line does not come soon."""
    assert process.stdout is not None
    unfinished = b""
    while True:
        with trio.fail_after(START_TIMEOUT_S):
            data = await process.stdout.receive_some()
        if not data:
            raise RuntimeError(f"the process ended before it was ready: {process.args!r}")
        *whole, unfinished = (unfinished + data).split(b"\n")
        for line in whole:
            yield line
