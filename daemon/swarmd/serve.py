"""A server's life: the order in which it starts, what it does meanwhile, and the order in which it stops.

    start   listen -> join the swarm and find out how others reach us, while torch is imported -> choose blocks
            -> announce JOINING, while they load -> answer requests -> announce ONLINE -> ready
    serve   these blocks, and where the swarm needs others more, those (`swarmd/span_life.py`)
    stop    begin nothing new -> announce DRAINING, while what runs finishes -> announce OFFLINE -> leave the network

A stop comes at any moment, also in the middle of a start or a move. Decides nothing about requests
(`swarmd/handler.py`) nor about sizes (`swarmd/engine.py`).
"""

import importlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import trio

from p2pswarm.core.clock import Clock
from p2pswarm.core.errors import SwarmingError
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerState
from p2pswarm.core.span import Span
from p2pswarm.dht.node import DhtNode
from p2pswarm.directory.announcer import Announcer
from p2pswarm.directory.directory import Directory
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.placement.rebalancing import should_move
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.server import RpcServer
from swarmd.balancing import Balancing
from swarmd.block_taking import take_worst_served
from swarmd.config import ServerConfig
from swarmd.device_thread import DeviceThread, open_device_thread
from swarmd.events import Events
from swarmd.identity_file import known_peers_path
from swarmd.joining import join
from swarmd.line_speed import Line, RememberedLine
from swarmd.listen import listen_addresses
from swarmd.lookout import Lookout
from swarmd.monitor import Monitor
from swarmd.presence import Presence
from swarmd.private_swarm import private_swarm_of
from swarmd.reaching import Reaching
from swarmd.self_description import joining_info, ready_fields
from swarmd.served_span import CurrentSpan
from swarmd.span_life import SpanLife
from swarmd.stopping import unless
from swarmd.surroundings import Surroundings
from swarmd.throughput import ThroughputSource
from swarmd.unused_memory import give_unused_memory_back
from swarmd.weight_progress import WeightProgress

if TYPE_CHECKING:
    from swarmd.engine import OpenedModel

DRAINING_ANNOUNCEMENT_TIMEOUT_S = 2.0
"""Clients learn it from our refusals as well."""


async def serve(
    config: ServerConfig,
    identity_path: Path,
    events: Events,
    stop: trio.Event,
    *,
    clock: Clock,
    random: Random,
    started_unix_s: float,
) -> None:
    """Serves blocks of a model until `stop` is set, then stops in order. Raises `SwarmingError`: it cannot start."""
    events("starting", model=config.model, version=version("p2pswarm"))
    identity = Identity.load_or_create(identity_path)
    private = private_swarm_of(config, identity_path, identity.peer_id)
    listen = listen_addresses(config.host, config.port)
    async with (
        open_network(identity, listen=listen, announce=config.announce, private=private) as network,
        open_device_thread() as device,
        open_transparent_nursery() as nursery,
    ):
        known_peers = known_peers_path(identity_path, private)
        if not config.peers and config.identity is None:
            known_peers.unlink(missing_ok=True)  # a new swarm, whatever this default identity was used for before
        dht = DhtNode(network, clock, random, known_peers_path=known_peers)
        await nursery.start(dht.run)
        reaching = Reaching(config, network, dht, clock, random, events)
        await nursery.start(reaching.run)
        announcer = Announcer(dht, network, clock, random)
        nursery.start_soon(announcer.run)
        directory = Directory(dht, clock, random)
        around = Surroundings(network, dht, reaching, announcer, directory, RpcClient(network), clock, random, events)
        nursery.start_soon(join, config.peer_addresses, dht, reaching, events)
        if private is not None:
            nursery.start_soon(private.members.raise_when_removed, network.peer_id)
        try:
            running = await unless(stop, partial(_start, config, around, device, nursery))
            if running is not None:
                start_s = clock.unix_time_s() - started_unix_s
                info, device_name = running.presence.info, str(running.opened.device)
                monitor = Monitor(running.presence, running.current, running.rpc, running.life, network.traffic)
                await nursery.start(monitor.run, config, events)
                nursery.start_soon(give_unused_memory_back)
                events("ready", **ready_fields(config, info, running.line, device_name, start_s))
                await unless(stop, running.life.serve)
                await _drain(config, around, running)
        except SwarmingError:
            await announcer.withdraw()  # of what is there no more, or was about to join
            raise
        await announcer.withdraw()
        nursery.cancel_scope.cancel()
    events("stopped")


@dataclass(frozen=True, slots=True)
class Running:
    """The parts of a server."""

    opened: "OpenedModel"
    presence: Presence
    rpc: RpcServer
    current: CurrentSpan
    life: SpanLife
    line: Line


async def _start(config: ServerConfig, around: Surroundings, device: DeviceThread, nursery: trio.Nursery) -> Running:
    opened = await _open_model(config, around, device)
    num_blocks = await _num_blocks_to_choose(config, device, opened, around.events)
    told = config.blocks or Span(0, opened.num_blocks)
    info = replace(joining_info(config, around.network, opened, told), is_pinned=num_blocks is None)
    running = _assemble(config, around, device, opened, Presence(around.announcer, info, around.reach))
    await nursery.start(running.rpc.run)
    async with open_transparent_nursery() as meanwhile:
        if num_blocks is None:
            meanwhile.start_soon(running.presence.become, ServerState.JOINING)
        else:
            await around.reach.wait_settled()
            await take_worst_served(num_blocks, running.presence, around.directory)
        await running.life.begin()
    nursery.start_soon(
        running.line.measure,
        opened.model_id,
        around.directory,
        around.network,
        around.calls,
        around.random,
        around.events,
    )
    return running


async def _open_model(config: ServerConfig, around: Surroundings, device: DeviceThread) -> "OpenedModel":
    await device.run(_import_engine)
    from swarmd import engine  # at once: the device's thread has imported it

    opened = await device.run(partial(engine.open_model, config, WeightProgress(around.events)))
    if opened.warning is not None:
        around.events("warning", message=opened.warning)
    return opened


def _assemble(
    config: ServerConfig, around: Surroundings, device: DeviceThread, opened: "OpenedModel", presence: Presence
) -> Running:
    """The parts of a server, none of which has begun."""
    from swarmd.span_loading import ModelLoader  # at once: the device's thread has imported it

    line = Line(
        RememberedLine(map(str, around.network.own_listen_addresses()), around.clock),
        is_measured_anew=config.throughput is ThroughputSource.EVAL,
    )
    current = CurrentSpan(presence, around.dht)
    rpc = RpcServer(around.network, current)
    loader = ModelLoader(opened, config, device, current.describe, around.events, line)
    balancing = None if presence.info.is_pinned else _balancing(config, around, presence)
    life = SpanLife(around, presence, current, rpc, loader, balancing, grace_period_s=config.grace_period_s)
    return Running(opened, presence, rpc, current, life, line)


def _import_engine() -> None:
    """Imports all that stands on torch."""
    importlib.import_module("p2pswarm.blocks.light_imports").import_transformers_lightly()
    importlib.import_module("swarmd.span_loading")


async def _num_blocks_to_choose(
    config: ServerConfig, device: DeviceThread, opened: "OpenedModel", events: Events
) -> int | None:
    """How many blocks to serve: as many as asked for, or as fit; None where that leaves nothing to choose."""
    if config.blocks is not None:
        return None
    num_blocks = config.num_blocks
    if num_blocks is None:
        count = await device.run(partial(opened.count_blocks, config.kv_cache, config.training_memory))
        events("sized", **asdict(count))
        num_blocks = count.num_blocks
    return None if num_blocks == opened.num_blocks else num_blocks


def _balancing(config: ServerConfig, around: Surroundings, presence: Presence) -> Balancing:
    lookout = Lookout(presence.info, around.directory, around.network, around.calls, around.random)
    decide = partial(should_move, balance_quality=config.balance_quality)
    return Balancing(presence, lookout.others, decide, around.random, config.balance_check_period_s)


async def _drain(config: ServerConfig, around: Surroundings, running: Running) -> None:
    """Begins nothing new, and lets what runs finish, for a while."""
    running.rpc.stop_accepting()
    num_sessions = running.rpc.statistics().num_sessions
    around.events("draining", num_sessions=num_sessions, grace_period_s=config.grace_period_s)
    async with open_transparent_nursery() as nursery:
        if num_sessions:
            nursery.start_soon(_announce_draining, running.presence)
        await running.rpc.drain(config.grace_period_s)


async def _announce_draining(presence: Presence) -> None:
    with trio.move_on_after(DRAINING_ANNOUNCEMENT_TIMEOUT_S):
        await presence.become(ServerState.DRAINING)
