"""`swarm route`: the chain that a client here would choose now, what each step of it costs, and why no other server is
in it. Loads no model and opens no session."""

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio
from rich.console import Console
from rich.table import Table

from p2pswarm.client.membership import Membership, join_swarm
from p2pswarm.core.errors import ConfigError, SwarmingError
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.routing.adapters import find_adapter
from p2pswarm.routing.dstar_planner import DStarLitePlanner
from p2pswarm.routing.explain import EdgeKind, Explanation, RouteEdge, TurnedDown
from p2pswarm.routing.planner import RouteRequest
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.round_trip import measure_round_trip_s
from swarm_cli.announced import AnnouncedModel, find_models
from swarm_cli.entrance import entrance
from swarm_cli.paths import FoundPath, PathWatch, as_reached, path_as_json, path_in_words
from swarm_cli.route_words import route_as_json, route_in_words, server_name
from swarm_cli.run_async import run_async

MAX_MEASURED = 64
"""Servers, at once. Routing takes those not measured for far ones."""


@dataclass(frozen=True, slots=True)
class ExplainedRoute:
    """What the command has to tell."""

    model_id: ModelId
    servers: Mapping[PeerId, ServerInfo]
    round_trips_s: Mapping[PeerId, float]
    explanation: Explanation
    paths: Mapping[PeerId, FoundPath] = field(default_factory=dict)


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    told = run_async(partial(_explain, arguments))
    if arguments.json:
        print(json.dumps(as_json(told)))
    else:
        print_route(Console(highlight=False, soft_wrap=True), told)
    return 0


async def _explain(arguments: argparse.Namespace) -> ExplainedRoute:
    async with join_swarm(arguments.peers, **entrance(arguments)) as membership:
        model = the_one(await find_models(membership, arguments.model), arguments.model)
        watch = PathWatch(membership.network)
        membership.nursery.start_soon(watch.run, [server.peer_id for server in model.servers])
        round_trips_s = await _measure(membership, model.servers)
        await watch.wait_direct(round_trips_s)
        planner = DStarLitePlanner(membership.config.costs)
        planner.update(as_reached(model.servers, membership.network), round_trips_s)
        adapter = None if arguments.adapter is None else find_adapter(arguments.adapter, model.servers)
        request = RouteRequest(Span(0, model.num_blocks), max_length=arguments.max_length or 0, adapter=adapter)
        explanation = planner.explain(request, trio.current_time())
        servers = {server.peer_id: server for server in model.servers}
        return ExplainedRoute(model.model_id, servers, round_trips_s, explanation, watch.found)


def the_one(models: list[AnnouncedModel], wanted: str) -> AnnouncedModel:
    """The only model of that name. Raises `ConfigError` where there are several."""
    if len(models) > 1:
        ids = ", ".join(model.model_id for model in models)
        raise ConfigError(f"{wanted} may be any of {ids}: give the whole id")
    return models[0]


async def _measure(membership: Membership, servers: Iterable[ServerInfo]) -> dict[PeerId, float]:
    """Round trips from here to those that are online and answer."""
    network, timeout_s = membership.network, membership.config.ping_timeout_s
    rpc = RpcClient(network)
    measured: dict[PeerId, float] = {}

    async def measure(server: ServerInfo) -> None:
        network.add_addresses(server.peer_id, server.addresses)
        try:
            measured[server.peer_id] = await measure_round_trip_s(network, rpc, server.peer_id, timeout_s)
        except SwarmingError:
            return  # counts as far away, as it does for a client

    online = [server for server in servers if server.state is ServerState.ONLINE]
    async with trio.open_nursery() as nursery:
        for server in online[:MAX_MEASURED]:
            nursery.start_soon(measure, server)
    rpc.close()
    return measured


def as_json(told: ExplainedRoute) -> dict[str, Any]:
    """What `--json` prints."""
    explanation = told.explanation
    return {
        "model_id": told.model_id,
        "cost_us": explanation.route.cost_us,
        "route": route_as_json(explanation.route, told.servers),
        "paths": [path_as_json(peer_id, told.paths.get(peer_id)) for peer_id in hops(told)],
        "edges": [_edge_as_json(edge) for edge in explanation.edges],
        "turned_down": [
            {
                "peer_id": one.peer_id,
                "name": told.servers[one.peer_id].public_name,
                "start": one.span.start,
                "end": one.span.end,
                "why": one.why,
                "extra_us": one.extra_us,
            }
            for one in explanation.turned_down
        ],
        "round_trips_s": dict(told.round_trips_s),
    }


def hops(told: ExplainedRoute) -> list[PeerId]:
    """The servers of the route, each once."""
    return list(dict.fromkeys(hop.peer_id for hop in told.explanation.route.hops))


def _edge_as_json(edge: RouteEdge) -> dict[str, Any]:
    return {
        "kind": edge.kind.value,
        "from": edge.source,
        "to": edge.target,
        "start": None if edge.span is None else edge.span.start,
        "end": None if edge.span is None else edge.span.end,
        "cost_us": edge.cost_us,
        "parts_us": nonzero_parts(edge),
    }


def nonzero_parts(edge: RouteEdge) -> dict[str, int]:
    """What the edge's cost is made of: `network`, `overhead`, `queue`, ..., in microseconds."""
    return {name.removesuffix("_us"): cost_us for name, cost_us in edge.parts._asdict().items() if cost_us}


def print_route(console: Console, told: ExplainedRoute) -> None:
    """The route, its edges as a table, and who was left out."""
    explanation, servers = told.explanation, told.servers
    route = explanation.route
    console.print(f"[bold]{told.model_id}[/]: {milliseconds(route.cost_us)} ms a token")
    console.print(f"[dim]route[/] {route_in_words(route, servers)}")
    for peer_id in hops(told):
        console.print(f"[dim]path[/] {server_name(peer_id, servers)}: {path_in_words(told.paths.get(peer_id))}")
    table = Table(box=None, pad_edge=False)
    for column in ("", "ms", "made of"):
        table.add_column(column, justify="right" if column == "ms" else "left")
    for edge in explanation.edges:
        parts = ", ".join(f"{name.replace('_', ' ')} {milliseconds(us)}" for name, us in nonzero_parts(edge).items())
        table.add_row(edge_in_words(edge, servers), milliseconds(edge.cost_us), parts)
    console.print(table)
    for one in explanation.turned_down:
        console.print(f"[dim]left out[/] {turned_down_in_words(one, servers)}")


def edge_in_words(edge: RouteEdge, servers: Mapping[PeerId, ServerInfo]) -> str:
    """Who does what."""
    source, target = (
        "client" if peer_id is None else server_name(peer_id, servers) for peer_id in (edge.source, edge.target)
    )
    match edge.kind:
        case EdgeKind.RUN:
            return f"{source} runs {edge.span}"
        case EdgeKind.PUSH:
            return f"{source} pushes to {target}"
        case EdgeKind.ENTER | EdgeKind.LEAVE:
            return f"{source} to {target}"


def turned_down_in_words(one: TurnedDown, servers: Mapping[PeerId, ServerInfo]) -> str:
    """Who, with which blocks, and why."""
    return f"{one.span} {server_name(one.peer_id, servers)}: {one.why}"


def milliseconds(cost_us: int) -> str:
    """With one decimal."""
    return f"{cost_us / 1000:.1f}"
