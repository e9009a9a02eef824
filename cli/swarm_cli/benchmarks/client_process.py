"""One client of `swarm bench --clients N --client-processes`, a process of its own.

It reads JSON lines: first `model`, `peers`, `dtype`, `threads`, `local_blocks`; then, as often as it likes, a task and,
once its first token has come, an empty object for it to go on. It answers each line with one. It ends with its stdin.
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import trio

from p2pswarm.client.swarm import open_swarm
from swarm_cli.benchmarks.clients import SessionClient, Task
from swarm_cli.benchmarks.setting import client_config
from swarm_cli.run_async import run_async


def main() -> None:
    """Runs until stdin ends."""
    terms = json.loads(sys.stdin.readline())
    torch.set_num_threads(terms["threads"])
    run_async(partial(_serve, terms))


async def _serve(terms: dict[str, Any]) -> None:
    async with open_swarm(terms["peers"], config=client_config(terms["local_blocks"])) as swarm:
        client = SessionClient(await swarm.load(terms["model"], dtype=getattr(torch, terms["dtype"])))
        _tell({})
        while line := await _read_line():
            _tell(asdict(await client.decode(Task(**json.loads(line)), _until_told)))


async def _until_told() -> None:
    _tell({})
    await _read_line()


async def _read_line() -> str:
    """Empty at the end."""
    return await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
