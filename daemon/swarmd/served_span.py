"""The span that a server serves now: nothing at first, then one span after the other.

`CurrentSpan` is what `rpc/server.py` asks for the whole life of a server. In between two spans, and for blocks that a
server held before it moved, clients are sent elsewhere. Knows nothing of torch. `swarmd/span_loading.py` makes spans.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from p2pswarm.core.errors import ServerBusy
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.server_load import ServerLoad
from p2pswarm.core.span import Span
from p2pswarm.dht.node import DhtNode
from p2pswarm.rpc.service import RpcService, SessionService
from p2pswarm.wire.messages import Backward, BackwardReply, Forward, ForwardReply, InfoReply, OpenSession
from swarmd.engine_statistics import EngineStatistics
from swarmd.figures import AtSpeed, Figures, Room, Waiting
from swarmd.presence import Presence
from swarmd.self_description import answer_info


@dataclass(frozen=True, slots=True)
class ServedSpan:
    """A span that is loaded."""

    service: RpcService
    info: ServerInfo
    """What to announce once it answers requests."""
    room: Room
    waiting: Waiting
    at_speed: AtSpeed
    probe: Callable[[], Awaitable[None]]
    """Takes one step through `service`, as a client would. Raises when the span does not compute."""
    statistics: Callable[[], EngineStatistics | None] = lambda: None
    """What `service` has to do; None: it does not count."""


class SpanLoader(Protocol):
    """Makes spans of one model, one at a time."""

    async def load(self, info: ServerInfo) -> ServedSpan:
        """The span that `info` announces. Raises whatever is wrong with disk, memory or network."""
        ...

    async def free(self) -> None:
        """Gives the memory of the span loaded last back; nobody refers to it any more."""
        ...


class CurrentSpan:
    """Implements `rpc.service.RpcService` by the span served now."""

    def __init__(self, presence: Presence, dht: DhtNode) -> None:
        self._presence = presence
        self._dht = dht
        self._served: ServedSpan | None = None
        self._figures: Figures | None = None
        self._has_served_others = False
        self.describe_load: Callable[[], ServerLoad | None] = lambda: None
        """For clients who ask; set by who knows the rest of the server."""

    def begin(self, served: ServedSpan, figures: Figures) -> None:
        """From now on requests go to `served`."""
        self._served, self._figures = served, figures

    def end(self) -> None:
        """From now on nothing is served, and nothing of what was is held on to."""
        self._served = self._figures = None
        self._has_served_others = True

    def describe(self) -> InfoReply:
        """What a client is told who asks."""
        return replace(answer_info(self._presence, self._figures, self._dht), load=self.describe_load())

    def statistics(self) -> EngineStatistics | None:
        """Of the blocks served now, if there are any."""
        return self._served.statistics() if self._served is not None else None

    async def info(self, peer_id: PeerId) -> InfoReply:
        return self.describe()

    async def open_session(self, peer_id: PeerId, request: OpenSession) -> SessionService:
        return await self._service(request.model_id, request.span).open_session(peer_id, request)

    async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply:
        return await self._service(request.model_id, request.span).forward(peer_id, request)

    async def backward(self, peer_id: PeerId, request: Backward) -> BackwardReply:
        return await self._service(request.model_id, request.span).backward(peer_id, request)

    def _service(self, model_id: ModelId, span: Span) -> RpcService:
        """Raises `ServerBusy` for a client whose picture of us is old: it is not wrong, and looks again then."""
        info = self._presence.info
        if self._served is None:
            raise ServerBusy(f"this server is loading blocks {info.span}")
        is_elsewhere = span.end <= info.num_model_blocks and not info.span.contains(span)
        if self._has_served_others and model_id == info.model_id and is_elsewhere:
            raise ServerBusy(f"this server has moved to blocks {info.span}, asked were {span}")
        return self._served.service
