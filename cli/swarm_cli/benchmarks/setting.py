"""What every benchmark stands on: a swarm, joined or started here, the model over it, and the same model in memory."""

import argparse
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import trio
from rich.console import Console
from rich.table import Table

from p2pswarm.blocks.loading import without_progress_bars
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.swarm import open_swarm
from p2pswarm.net.private.invitation import Invitation, accept_invitations
from p2pswarm.net.private.swarm_key import SwarmKey
from swarm_cli.benchmarks.generating import exactly, make_prompt
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm, split_evenly
from swarm_cli.route_words import route_as_json
from swarm_cli.sample_model import sample_model


class Report(Protocol):
    """What a benchmark has found."""

    def as_json(self) -> dict[str, Any]: ...

    def as_table(self) -> Table:
        """For people; the title is left to the command."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """Made by `open_setting`; ends with its context."""

    model: DistributedModel
    local: Any
    """transformers' model of the same weights, whole, in the same dtype."""
    model_path: str
    peers: tuple[str, ...]
    dtype: str
    threads: int
    route: list[dict[str, Any]]
    max_length: int
    """Tokens of the longest session that all servers of the route take."""
    local_blocks: int
    """Of each end of the model, run by the client."""
    console: Console = field(repr=False)
    """For what is told meanwhile."""

    def say_round(self, number: int, num_rounds: int) -> None:
        self.console.print(f"[dim]round {number} of {num_rounds}{' (warm-up)' if number == 0 else ''}[/]")

    @property
    def title(self) -> str:
        kept = f", {self.local_blocks} blocks of each end at the client" if self.local_blocks else ""
        return f"{self.model.checkpoint.name}, {self.dtype}, {len(self.route)} hops, {self.threads} torch threads{kept}"

    def as_json(self) -> Mapping[str, Any]:
        return {
            "model": self.model.checkpoint.name,
            "dtype": self.dtype,
            "threads": self.threads,
            "local_blocks": self.local_blocks,
            "route": self.route,
        }


def client_config(local_blocks: int = 0) -> ClientConfig:
    """Benchmarks remember nobody, so that they say the same each time."""
    return ClientConfig(known_peers_path=None, local_blocks=local_blocks)


def load_whole_model(model: DistributedModel) -> Any:
    """transformers' model of the same weights, whole, in the same dtype."""
    with without_progress_bars():
        return load_local_model(model.checkpoint, model.shell.dtype)


@asynccontextmanager
async def open_setting(arguments: argparse.Namespace, console: Console) -> AsyncIterator[Setting]:
    """The swarm that `--peers` names, else servers of its own, each with as many torch threads as this process."""
    torch.set_num_threads(arguments.threads)
    model_path = arguments.model or sample_model()
    async with AsyncExitStack() as stack:
        given = None if arguments.swarm_key is None else SwarmKey.load(arguments.swarm_key)
        peers, key = accept_invitations(arguments.peers, given)
        if not peers:
            checkpoint = await trio.to_thread.run_sync(open_checkpoint, model_path)
            spans = split_evenly(checkpoint.num_blocks, arguments.servers)
            console.print(f"Starting {len(spans)} servers, {arguments.threads} torch threads each …")
            dtype = arguments.dtype or "float32"
            plan = LocalSwarmPlan(model_path, spans, arguments.threads, dtype, swarm_key=arguments.swarm_key)
            servers = await stack.enter_async_context(local_swarm(plan))
            peers = tuple(address for server in servers for address in server.addresses)
        if key is not None:
            peers = (str(Invitation(key, peers)),)  # every client of a benchmark, in whatever process, has the key then
        swarm = await stack.enter_async_context(open_swarm(peers, config=client_config(arguments.local_blocks)))
        wanted_dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
        model = await swarm.load(model_path, dtype=wanted_dtype)
        local = await trio.to_thread.run_sync(partial(load_whole_model, model))
        async with model.session(max_length=2) as session:
            await session.complete(make_prompt(1), **exactly(1))
            route = session.route
        assert route is not None, "a token has passed"
        yield Setting(
            model,
            local,
            model_path,
            peers,
            str(model.shell.dtype).removeprefix("torch."),
            arguments.threads,
            route_as_json(route, model.servers.known),
            min(model.servers.known[hop.peer_id].max_length for hop in route.hops),
            arguments.local_blocks,
            console,
        )
