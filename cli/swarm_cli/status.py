"""`swarm status`: which models there are, who serves which blocks, and which blocks nobody serves. Loads no model."""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.table import Table

from p2pswarm.client.membership import join_swarm
from p2pswarm.core.errors import ModelNotFound
from p2pswarm.core.ids import ModelId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span, uncovered
from swarm_cli.run_async import run_async


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model as the swarm announces it."""

    model_id: ModelId
    num_blocks: int
    servers: tuple[ServerInfo, ...]

    @property
    def uncovered(self) -> list[Span]:
        """Blocks that no online server holds."""
        online = [server.span for server in self.servers if server.state is ServerState.ONLINE]
        return uncovered(online, Span(0, self.num_blocks))


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    models = run_async(partial(_look_around, arguments.peers, arguments.model))
    if arguments.json:
        print(json.dumps({"models": [as_json(model) for model in models]}))
        return 0
    console = Console()
    if not models:
        console.print("No model is announced in this swarm. Start one: swarmd start MODEL --peers ...")
    for model in models:
        print_model(console, model)
    return 0


async def _look_around(peers: list[str], wanted: str | None) -> list[ModelStatus]:
    async with join_swarm(peers) as membership:
        summaries = await membership.directory.models()
        chosen = [model_id for model_id in sorted(summaries) if wanted is None or is_named(model_id, wanted)]
        if wanted is not None and not chosen:
            announced = f"announced are {', '.join(sorted(summaries))}" if summaries else "no model at all is announced"
            raise ModelNotFound(f"no model {wanted} in this swarm; {announced}")
        found = []
        for model_id in chosen:
            servers = (await membership.directory.servers(model_id)).values()
            in_order = sorted(servers, key=lambda server: (server.span, server.peer_id))
            found.append(ModelStatus(model_id, summaries[model_id].num_blocks, tuple(in_order)))
        return found


def is_named(model_id: ModelId, wanted: str) -> bool:
    """Whether the user may mean this model: its id, its name, or a path or hub id that ends in the name."""
    name = model_id.partition("@")[0]
    return wanted in (model_id, name) or PurePath(wanted).name.removesuffix(".gguf") == name


def as_json(model: ModelStatus) -> dict[str, Any]:
    """What `--json` prints of one model."""
    return {
        "model_id": model.model_id,
        "num_blocks": model.num_blocks,
        "uncovered": [[gap.start, gap.end] for gap in model.uncovered],
        "servers": [
            {
                "peer_id": server.peer_id,
                "name": server.public_name,
                "start": server.span.start,
                "end": server.span.end,
                "state": server.state.value,
                "dtype": server.dtype,
                "quantization": server.quantization,
                "throughput_tokens_per_s": server.throughput_tokens_per_s,
                "inference_tokens_per_s": server.inference_tokens_per_s,
                "cache_tokens_left": server.cache_tokens_left,
                "max_length": server.max_length,
                "version": server.version,
                "addresses": list(server.addresses),
            }
            for server in model.servers
        ],
    }


def print_model(console: Console, model: ModelStatus) -> None:
    """One model as a table."""
    gaps = ", ".join(map(str, model.uncovered))
    coverage = f"[red]nobody serves {gaps}[/]" if gaps else "[green]all served[/]"
    console.print(f"[bold]{model.model_id}[/]: {model.num_blocks} blocks, {coverage}", highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("blocks", "state", "server", "name", "dtype", "tokens/s", "cache left", "version"):
        table.add_column(column, justify="right" if column in ("tokens/s", "cache left") else "left")
    for server in model.servers:
        table.add_row(
            str(server.span),
            server.state.value,
            server.peer_id,
            server.public_name,
            server.dtype,
            f"{server.throughput_tokens_per_s:.0f}",
            str(server.cache_tokens_left),
            server.version,
        )
    console.print(table)
