"""Who serves one model, as this client sees it: the directory's live view, what was measured from here, routes.

All sessions and calls of a client share what is learnt here: who failed, how long steps take, who can push to whom.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.recovery import HopFailure, Recovery, ban_reason
from p2pswarm.client.step_times import StepTimes
from p2pswarm.core.errors import (
    AdapterNotFound,
    DeadlineExceeded,
    MissingBlocksError,
    NetworkError,
    RemoteError,
    RequestRefused,
    SwarmingError,
)
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span, uncovered
from p2pswarm.net.network import Network
from p2pswarm.routing.adapters import find_adapter
from p2pswarm.routing.bans import Ban, BanReason
from p2pswarm.routing.planner import Planner, RepairRequest, RouteRequest, ServerFilter
from p2pswarm.routing.route import Hop, Route, short_peers
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.round_trip import measure_round_trip_s

MAX_MISSED_PUSHES = 3
"""In a row; the first of a pair of servers often comes late, since they have to find each other."""
RELAY_AFTER_MISSED_PUSHES_S = 300.0
"""How long the client relays between two servers that could not hand on, before they may try again."""
ANSWER_TOGETHER_S = 0.3
"""Servers that are asked at one time and are alive answer within about so much of each other."""
MAX_STEP_TIMES = 1024
"""Hops whose times are remembered, before those of servers that have left are forgotten."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(server: ServerInfo) -> torch.dtype:
    """What the server computes in; float32 where that could not be sent, since servers convert what they get."""
    return DTYPES.get(server.dtype, torch.float32)


class ServerView(Protocol):
    """Who is announced for the model; `directory.view.ModelView` is the live one."""

    @property
    def servers(self) -> Mapping[PeerId, ServerInfo]: ...

    async def refresh(self) -> None:
        """Asks the swarm now."""
        ...


@dataclass(slots=True)
class PushRecord:
    """How one server handed on to another."""

    num_missed: int = 0
    """In a row."""
    relayed_until_s: float = -math.inf


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What every server of the model must agree with."""

    model_id: ModelId
    num_blocks: int
    hidden_size: int

    @property
    def span(self) -> Span:
        return Span(0, self.num_blocks)


class ModelServers:
    """Plans over `view`; failures reported here are routed around for a while."""

    def __init__(
        self,
        facts: ModelFacts,
        view: ServerView,
        planner: Planner,
        network: Network,
        rpc: RpcClient,
        config: ClientConfig,
    ) -> None:
        self.facts = facts
        self._view = view
        self._planner = planner
        self._network = network
        self._rpc = rpc
        self._config = config
        self._filter = ServerFilter(config.allowed_servers, config.blocked_servers, config.quantization)
        self._measured_s: dict[PeerId, float] = {}
        self._step_times: dict[tuple[Hop, bool], StepTimes] = {}
        self._push_records: defaultdict[tuple[PeerId, PeerId], PushRecord] = defaultdict(PushRecord)

    @property
    def known(self) -> Mapping[PeerId, ServerInfo]:
        """All announced servers, in whatever state."""
        return self._view.servers

    @property
    def online(self) -> Mapping[PeerId, ServerInfo]:
        """Servers that are announced as ready."""
        return {peer_id: server for peer_id, server in self._view.servers.items() if server.state is ServerState.ONLINE}

    def round_trips_s(self) -> dict[PeerId, float]:
        """The latest measurement for each server that there is one for."""
        latest = {peer_id: self._network.round_trip_s(peer_id) for peer_id in self._view.servers}
        return self._measured_s | {peer_id: rtt_s for peer_id, rtt_s in latest.items() if rtt_s is not None}

    def round_trip_s(self, peer_id: PeerId) -> float:
        """The latest measurement, or what routing assumes where there is none."""
        measured_s = self._network.round_trip_s(peer_id) or self._measured_s.get(peer_id)
        return self._config.costs.unknown_round_trip_s if measured_s is None else measured_s

    async def route(self, request: RouteRequest) -> Route:
        """The best route now. Where blocks are missing, asks the swarm once more, then raises `MissingBlocksError`."""
        return await self._planned(lambda now_s: self._planner.plan(request, now_s))

    async def repair(self, request: RepairRequest) -> Route:
        """The best hops for lost blocks and those after them. Raises as `route` does."""
        return await self._planned(lambda now_s: self._planner.repair(request, now_s))

    async def _planned(self, plan: Callable[[float], Route]) -> Route:
        try:
            route = self._plan_now(plan)
        except MissingBlocksError:
            await self._view.refresh()
            try:
                route = self._plan_now(plan)
            except MissingBlocksError as error:
                asked = short_peers(sorted(self._network.connected_peers)) or "nobody: no peer is connected"
                raise MissingBlocksError(f"{error}; asked: {asked}", error.missing) from error
        for hop in route.hops:
            server = self._view.servers.get(hop.peer_id)
            if server is not None:  # a hop that is kept may be of a server that is no longer announced
                self._network.add_addresses(hop.peer_id, server.addresses)
        return route

    def _plan_now(self, plan: Callable[[float], Route]) -> Route:
        self._planner.update(map(self._as_reached, self._view.servers.values()), self.round_trips_s())
        return plan(trio.current_time())

    def _as_reached(self, server: ServerInfo) -> ServerInfo:
        """The server, as routes from here count it: one that this client has a direct connection to, in whatever way
        it came about, is not behind a relay."""
        path = self._network.path(server.peer_id) if server.using_relay else None
        return replace(server, using_relay=False) if path is not None and path.is_direct else server

    async def report_failure(self, error: HopFailure, recovery: Recovery) -> None:
        """Keeps the server that the error names out of new routes for a while, if it is to blame."""
        peer_id, reason = error.peer_id, ban_reason(error)
        if peer_id is None or reason is None:
            return
        if reason is BanReason.UNREACHABLE and self._has_relays(peer_id) and recovery.gives_another_path(peer_id):
            path = self._network.path(peer_id)
            if isinstance(error, DeadlineExceeded) and path is not None and not path.is_direct:
                await self._network.disconnect(peer_id)  # else the next stream would be opened over the same relay
            return
        self._planner.ban(peer_id, trio.current_time(), reason)

    def _has_relays(self, peer_id: PeerId) -> bool:
        """Whether others reach the server through relays, as it announces."""
        server = self._view.servers.get(peer_id)
        return server is not None and server.using_relay

    @property
    def banned(self) -> Mapping[PeerId, Ban]:
        """Servers that are left out of new routes now."""
        return self._planner.banned(trio.current_time())

    async def find_adapter(self, name: str | None) -> str | None:
        """The id of the adapter of that name or id, by default that of the config; None: none.

        Where no server announces it, asks the swarm once more, then raises `AdapterNotFound`; `ConfigError` where it
        may be any of several.
        """
        wanted = name or self._config.active_adapter
        if wanted is None:
            return None
        with contextlib.suppress(AdapterNotFound):
            return find_adapter(wanted, self.known.values())
        await self._view.refresh()
        return find_adapter(wanted, self.known.values())

    def may_return(self, missing: Sequence[tuple[int, int]], max_length: int, adapter: str | None = None) -> bool:
        """Whether all of the missing blocks are held by servers that could be used if they were ready."""
        spans = [
            server.span
            for server in self._view.servers.values()
            if server.state in (ServerState.JOINING, ServerState.ONLINE)
            and self._filter.objection(server) is None
            and (server.max_length == 0 or server.max_length >= max_length)
            and (adapter is None or adapter in server.adapters)
        ]
        return not any(uncovered(spans, Span(start, end)) for start, end in missing)

    async def forgive(self, missing: Sequence[tuple[int, int]], recovery: Recovery) -> None:
        """Ends bans of servers of the missing blocks: of those that could not be reached and answer now, and as a last
        resort of those that misbehaved. Once one has answered, those that hang are not waited for."""
        async with trio.open_nursery() as nursery:
            for peer_id, ban in self.banned.items():
                if not self._has_any_of(missing, peer_id):
                    continue
                if ban.reason is BanReason.UNREACHABLE:
                    nursery.start_soon(self._forgive_if_alive, peer_id, nursery.cancel_scope)
                elif recovery.gives_another_chance(peer_id):
                    self._planner.forgive(peer_id)

    def _has_any_of(self, blocks: Sequence[tuple[int, int]], peer_id: PeerId) -> bool:
        server = self._view.servers.get(peer_id)
        return server is not None and any(server.span.start < end and start < server.span.end for start, end in blocks)

    async def _forgive_if_alive(self, peer_id: PeerId, others: trio.CancelScope) -> None:
        self._network.add_addresses(peer_id, self._view.servers[peer_id].addresses)
        if await self.is_alive(peer_id):
            self._planner.forgive(peer_id)
            others.deadline = min(others.deadline, trio.current_time() + ANSWER_TOGETHER_S)

    async def is_alive(self, peer_id: PeerId) -> bool:
        """Whether the server answers anything at all."""
        try:
            await self._rpc.info(peer_id, self._config.ping_timeout_s)
        except NetworkError:
            return False
        except (RemoteError, RequestRefused):
            return True  # whatever it says: a server with its hands full has no room for a question either
        return True

    def step_times(self, hop: Hop, *, in_sessions: bool = True) -> StepTimes:
        """How long the hop's server has needed for steps through these blocks, in any session; or for calls without
        one, many of which wait for each other."""
        if len(self._step_times) > MAX_STEP_TIMES:  # servers come and go
            self._step_times = {key: times for key, times in self._step_times.items() if key[0].peer_id in self.known}
        return self._step_times.setdefault((hop, in_sessions), StepTimes())

    def can_push(self, sender: PeerId, receiver: PeerId) -> bool:
        """Whether the one server can hand on to the other, as far as is known."""
        return self._push_records[sender, receiver].relayed_until_s <= trio.current_time()

    def note_push(self, sender: PeerId, receiver: PeerId, *, arrived: bool) -> None:
        """Whether what the one server was to hand on has come in time."""
        record = self._push_records[sender, receiver]
        record.num_missed = 0 if arrived else record.num_missed + 1
        if record.num_missed >= MAX_MISSED_PUSHES:
            record.relayed_until_s = trio.current_time() + RELAY_AFTER_MISSED_PUSHES_S
            record.num_missed = 0

    async def measure_round_trips(self) -> None:
        """Talks to servers not measured yet, all at once; those that do not answer in time stay unmeasured."""
        unknown = sorted(self.online.keys() - self.round_trips_s().keys())[: self._config.max_pinged]
        with trio.move_on_after(self._config.ping_timeout_s):
            async with trio.open_nursery() as nursery:
                for peer_id in unknown:
                    nursery.start_soon(self._measure, peer_id)

    async def _measure(self, peer_id: PeerId) -> None:
        self._network.add_addresses(peer_id, self._view.servers[peer_id].addresses)
        with contextlib.suppress(SwarmingError):  # far away, to routing; opening a session will say what is wrong
            self._measured_s[peer_id] = await measure_round_trip_s(
                self._network, self._rpc, peer_id, self._config.ping_timeout_s
            )
