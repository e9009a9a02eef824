"""Why servers cannot be in a route, and the error that says so when blocks are left without a server."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from p2pswarm.core.errors import MissingBlocksError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span, uncovered
from p2pswarm.routing.bans import Ban
from p2pswarm.routing.planner import RouteRequest, ServerFilter
from p2pswarm.routing.route import short_peer


@dataclass(frozen=True, slots=True)
class Admission:
    """Who may be in a route at one moment."""

    servers: ServerFilter
    banned: Mapping[PeerId, Ban]
    now_s: float

    def objection(self, server: ServerInfo, request: RouteRequest) -> str | None:
        """Why the server cannot be in the route; None when it can."""
        if server.state is not ServerState.ONLINE:
            return str(server.state.value)
        ban = self.banned.get(server.peer_id)
        if ban is not None:
            return f"banned for {ban.until_s - self.now_s:.0f} s more after a failure ({ban.reason.value})"
        if server.peer_id in request.avoided:
            return "failed it or has no room now"
        if 0 < server.max_length < request.max_length:
            return f"takes at most {server.max_length} tokens, {request.max_length} are wanted"
        if request.adapter is not None and request.adapter not in server.adapters:
            return f"does not have the adapter {request.adapter}"
        return self.servers.objection(server)

    def divide(
        self, servers: Iterable[ServerInfo], request: RouteRequest
    ) -> tuple[dict[PeerId, ServerInfo], dict[PeerId, str]]:
        """The servers that can be used, and the objections to the others."""
        usable: dict[PeerId, ServerInfo] = {}
        objections: dict[PeerId, str] = {}
        for server in servers:
            why = self.objection(server, request)
            if why is None:
                usable[server.peer_id] = server
            else:
                objections[server.peer_id] = why
        return usable, objections


def missing_blocks(
    wanted: Span, usable: Iterable[Span], servers: Mapping[PeerId, ServerInfo], objections: Mapping[PeerId, str]
) -> MissingBlocksError | None:
    """The error that names each block range without a usable server, and who was turned down; None if there is none."""
    gaps = uncovered(list(usable), wanted)
    if not gaps:
        return None
    message = f"no server for blocks {', '.join(map(str, gaps))} of {wanted}"
    relevant = [
        f"{short_peer(peer_id)} {servers[peer_id].span} ({why})"
        for peer_id, why in sorted(objections.items())
        if any(servers[peer_id].span.start < gap.end and gap.start < servers[peer_id].span.end for gap in gaps)
    ]
    if relevant:
        message += f"; not usable: {', '.join(relevant)}"
    return MissingBlocksError(message, [(gap.start, gap.end) for gap in gaps])
