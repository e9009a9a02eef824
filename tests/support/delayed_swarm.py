"""A swarm of server processes far from everybody: each is reached, by clients and by the others, through a delay proxy
alone, whose address is the one it announces.
"""

import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from delay_proxy import HOST, DelayProxies, delay_proxies

from p2pswarm.core.span import Span
from swarm_cli.local_swarm import ServerProcess


@dataclass(frozen=True, slots=True)
class DelayedSwarm:
    """Its servers have announced themselves; there is no delay yet."""

    peers: tuple[str, ...]
    """Addresses of the proxies, with the servers' peer ids."""
    proxies: DelayProxies


@asynccontextmanager
async def delayed_swarm(model: str, spans: Sequence[Span], folder: Path) -> AsyncIterator[DelayedSwarm]:
    """One server with one thread for each span; their keys are made in `folder`."""
    ports = free_ports(len(spans))
    async with delay_proxies(ports) as proxies, trio.open_nursery() as nursery:
        peers: list[str] = []
        for span, port, proxy_port in zip(spans, ports, proxies.ports, strict=True):
            command = [
                *(sys.executable, "-m", "swarmd", "start", model, "--json", "--threads", "1", "--dtype", "float32"),
                *("--blocks", str(span), "--identity", str(folder / f"{span}.key")),
                *("--host", HOST, "--port", str(port), "--announce", f"/ip4/{HOST}/tcp/{proxy_port}"),
                *(("--peers", *peers) if peers else ()),
            ]
            server = ServerProcess(command, span)
            await nursery.start(server.run, ignore_event)
            peers += server.addresses
        yield DelayedSwarm(tuple(peers), proxies)
        nursery.cancel_scope.cancel()


def ignore_event(server: ServerProcess, event: dict[str, Any]) -> None:
    pass


def free_ports(count: int) -> list[int]:
    """Ports where nobody listens now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]
