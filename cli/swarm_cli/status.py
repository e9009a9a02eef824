"""`swarm status`: which models there are, who serves which blocks, and which blocks nobody serves. Loads no model."""

import argparse
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from p2pswarm.client.membership import join_swarm
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from swarm_cli.announced import AnnouncedModel, find_models
from swarm_cli.entrance import entrance
from swarm_cli.loads import Loads, ask_loads, load_as_json, load_table
from swarm_cli.paths import announced_reach, announced_relays
from swarm_cli.route_words import server_name
from swarm_cli.run_async import run_async

MAX_NEXT_SHOWN = 2
"""Round trips to the nearest servers; `--json` has all that are announced."""


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    models, loads = run_async(partial(_look_around, arguments))
    if arguments.json:
        print(json.dumps({"models": [as_json(model, loads) for model in models]}))
        return 0
    console = Console()
    if not models:
        console.print("No model is announced in this swarm. Start one: swarmd start MODEL --peers ...")
    for model in models:
        print_model(console, model)
        if loads is not None:
            console.print(load_table(model, loads))
    return 0


async def _look_around(arguments: argparse.Namespace) -> tuple[list[AnnouncedModel], Loads | None]:
    async with join_swarm(arguments.peers, **entrance(arguments)) as membership:
        models = await find_models(membership, arguments.model)
        servers = [server for model in models for server in model.servers]
        return models, await ask_loads(membership, servers) if arguments.details else None


def as_json(model: AnnouncedModel, loads: Loads | None = None) -> dict[str, Any]:
    """What `--json` prints of one model; with `loads`, those of its servers too, null where there is no answer."""
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
                "adapters": list(server.adapters),
                "throughput_tokens_per_s": server.throughput_tokens_per_s,
                "inference_tokens_per_s": server.inference_tokens_per_s,
                "cache_tokens_left": server.cache_tokens_left,
                "max_length": server.max_length,
                "queue_delay_s": server.queue_delay_s,
                "next_rtts_s": dict(server.next_rtts_s),
                "version": server.version,
                "addresses": list(server.addresses),
                "reachability": server.reachability.value,
                "relays": announced_relays(server),
                **({} if loads is None else {"load": load_as_json(loads.get(server.peer_id))}),
            }
            for server in model.servers
        ],
    }


def print_model(console: Console, model: AnnouncedModel) -> None:
    """One model as a table."""
    gaps = ", ".join(map(str, model.uncovered))
    coverage = f"[red]nobody serves {gaps}[/]" if gaps else "[green]all served[/]"
    console.print(f"[bold]{model.model_id}[/]: {model.num_blocks} blocks, {coverage}", highlight=False)
    table = Table(box=None, pad_edge=False)
    numbers = ("tokens/s", "cache left", "queue ms")
    for column in ("blocks", "state", "server", "name", "dtype", "weights", *numbers, "next ms", "reached", "version"):
        table.add_column(column, justify="right" if column in numbers else "left")
    servers = {server.peer_id: server for server in model.servers}
    for server in model.servers:
        table.add_row(
            str(server.span),
            server.state.value,
            server.peer_id,
            server.public_name,
            server.dtype,
            server.quantization,
            f"{server.throughput_tokens_per_s:.0f}",
            str(server.cache_tokens_left),
            f"{1000 * server.queue_delay_s:.0f}",
            next_in_words(server, servers),
            announced_reach(server),
            server.version,
        )
    console.print(table)


def next_in_words(server: ServerInfo, servers: Mapping[PeerId, ServerInfo]) -> str:
    """The nearest servers that may come next in a chain, with their round trips."""
    nearest = sorted(server.next_rtts_s.items(), key=lambda item: item[1])[:MAX_NEXT_SHOWN]
    return ", ".join(f"{server_name(peer_id, servers)} {1000 * rtt_s:.0f}" for peer_id, rtt_s in nearest)
