"""How busy servers are, as they say when they are asked: for `swarm status --details`."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import trio
from rich.table import Table

from p2pswarm.client.membership import Membership
from p2pswarm.core.byte_sizes import format_byte_size
from p2pswarm.core.errors import SwarmingError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.server_load import ServerLoad
from p2pswarm.routing.route import short_peer
from p2pswarm.rpc.client import RpcClient
from swarm_cli.announced import AnnouncedModel

MAX_ASKED = 64
"""Servers, at once."""

DECODED_AND_MORE = "decode + prompt + forward tokens/s"

Loads = Mapping[PeerId, ServerLoad]
"""Of those that have answered."""


async def ask_loads(membership: Membership, servers: Iterable[ServerInfo]) -> Loads:
    """What the servers say; those that do not answer in time, or are too old to know, are left out."""
    network, timeout_s = membership.network, membership.config.ping_timeout_s
    rpc = RpcClient(network)
    at_once = trio.CapacityLimiter(MAX_ASKED)
    loads: dict[PeerId, ServerLoad] = {}

    async def ask(server: ServerInfo) -> None:
        network.add_addresses(server.peer_id, server.addresses)
        try:
            async with at_once:
                reply = await rpc.info(server.peer_id, timeout_s)
        except SwarmingError:
            return
        if reply.load is not None:
            loads[server.peer_id] = reply.load

    async with trio.open_nursery() as nursery:
        for server in servers:
            nursery.start_soon(ask, server)
    rpc.close()
    return loads


def load_as_json(load: ServerLoad | None) -> dict[str, Any] | None:
    """Its fields under their own names."""
    return None if load is None else asdict(load)


def load_table(model: AnnouncedModel, loads: Loads) -> Table:
    """One line a server."""
    table = Table(box=None, pad_edge=False)
    for column in ("server", "up", "sessions", "waiting", "batch", DECODED_AND_MORE, "KV used", "in / out", "errors"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for server in model.servers:
        load = loads.get(server.peer_id)
        cells = ("no answer",) if load is None else load_in_words(load)
        table.add_row(server.public_name or short_peer(server.peer_id), *cells)
    return table


def load_in_words(load: ServerLoad) -> tuple[str, ...]:
    """The cells of its line."""
    rates = (load.decode_tokens_per_s, load.prefill_tokens_per_s, load.forward_tokens_per_s)
    return (
        uptime_in_words(load.uptime_s),
        str(load.num_sessions),
        str(load.num_waiting),
        f"{load.mean_batch_rows:.1f}",
        " + ".join(f"{rate:.1f}" for rate in rates),
        f"{load.cache_tokens_used / load.cache_tokens_total:.0%}" if load.cache_tokens_total else "",
        f"{format_byte_size(load.received_bytes)} / {format_byte_size(load.sent_bytes)}",
        str(load.num_errors),
    )


def uptime_in_words(uptime_s: float) -> str:
    """In its two largest units at most."""
    minutes, seconds = divmod(int(uptime_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    counts = {"d": days, "h": hours, "min": minutes, "s": seconds}
    return " ".join([f"{count} {unit}" for unit, count in counts.items() if count][:2]) or "0 s"
