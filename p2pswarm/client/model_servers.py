"""Who serves one model, as this client sees it: the directory's live view, round trips measured from here, routes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import trio

from p2pswarm.client.chain import ChainTerms
from p2pswarm.client.config import ClientConfig
from p2pswarm.core.errors import MissingBlocksError, NetworkError, RemoteError, ServerBusy, SwarmingError
from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.net.network import Network
from p2pswarm.routing.planner import Planner, RouteRequest
from p2pswarm.routing.route import Route, short_peers
from p2pswarm.rpc.client import RpcClient

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ServerView(Protocol):
    """Who is announced for the model; `directory.view.ModelView` is the live one."""

    @property
    def servers(self) -> Mapping[PeerId, ServerInfo]: ...

    async def refresh(self) -> None:
        """Asks the swarm now."""
        ...


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
        self._measured_s: dict[PeerId, float] = {}

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

    async def route(self, request: RouteRequest) -> Route:
        """The best route now. Where blocks are missing, asks the swarm once more, then raises `MissingBlocksError`."""
        try:
            route = self._plan(request)
        except MissingBlocksError:
            await self._view.refresh()
            try:
                route = self._plan(request)
            except MissingBlocksError as error:
                asked = short_peers(sorted(self._network.connected_peers)) or "nobody: no peer is connected"
                raise MissingBlocksError(f"{error}; asked: {asked}", error.missing) from error
        for hop in route.hops:
            self._network.add_addresses(hop.peer_id, self._view.servers[hop.peer_id].addresses)
        return route

    def _plan(self, request: RouteRequest) -> Route:
        self._planner.update(self._view.servers.values(), self.round_trips_s())
        return self._planner.plan(request, trio.current_time())

    def report_failure(self, error: RemoteError | NetworkError) -> None:
        """Keeps the server that the error names out of new routes for a while; one that is only busy is spared."""
        if error.peer_id is not None and not isinstance(error, ServerBusy):
            self._planner.ban(error.peer_id, trio.current_time() + self._config.ban_s)

    def without_failed(self, request: RouteRequest, error: RemoteError | NetworkError) -> RouteRequest:
        """The request for another route after the error's server failed it or had no room."""
        self.report_failure(error)
        return request if error.peer_id is None else replace(request, avoided=request.avoided | {error.peer_id})

    def dtype(self, peer_id: PeerId) -> torch.dtype:
        """What the server computes in; float32 where that could not be sent, since servers convert what they get."""
        return DTYPES.get(self._view.servers[peer_id].dtype, torch.float32)

    def dtypes(self, route: Route) -> Mapping[PeerId, torch.dtype]:
        """What each server of the route computes in. To be asked for with the route: servers may vanish later."""
        return {hop.peer_id: self.dtype(hop.peer_id) for hop in route.hops}

    def chain_terms(self, route: Route, request: RouteRequest, session_id: SessionId) -> ChainTerms:
        """What a chain over the route is opened with."""
        return ChainTerms(
            session_id,
            self.facts.model_id,
            request.max_length,
            request.batch_size,
            self._config.codec,
            self.dtypes(route),
        )

    async def measure_round_trips(self) -> None:
        """Talks to servers not measured yet, all at once; those that do not answer in time stay unmeasured."""
        unknown = sorted(self.online.keys() - self.round_trips_s().keys())[: self._config.max_pinged]
        with trio.move_on_after(self._config.ping_timeout_s):
            async with trio.open_nursery() as nursery:
                for peer_id in unknown:
                    nursery.start_soon(self._measure, peer_id)

    async def _measure(self, peer_id: PeerId) -> None:
        self._network.add_addresses(peer_id, self._view.servers[peer_id].addresses)
        try:
            await self._rpc.info(peer_id, self._config.ping_timeout_s)  # dials and opens the stream
            asked_at_s = trio.current_time()
            await self._rpc.info(peer_id, self._config.ping_timeout_s)
        except SwarmingError:
            return  # routing treats an unmeasured server as far away; opening a session will say what is wrong
        self._measured_s[peer_id] = trio.current_time() - asked_at_s
