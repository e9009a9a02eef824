"""Routes and servers as the command names them, to people and to programs. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.routing.route import Route, short_peer


def route_as_json(route: Route | None, servers: Mapping[PeerId, ServerInfo]) -> list[dict[str, Any]]:
    """A route's hops in order."""
    return [
        {
            "peer_id": hop.peer_id,
            "start": hop.span.start,
            "end": hop.span.end,
            "name": servers[hop.peer_id].public_name if hop.peer_id in servers else "",
        }
        for hop in (route.hops if route is not None else ())
    ]


def route_in_words(route: Route | None, servers: Mapping[PeerId, ServerInfo]) -> str:
    """`0:10 name -> 10:20 …peer id`."""
    hops = route.hops if route is not None else ()
    return " → ".join(f"{hop.span} {server_name(hop.peer_id, servers)}" for hop in hops)


def server_name(peer_id: PeerId, servers: Mapping[PeerId, ServerInfo]) -> str:
    """Its public name, or the end of its peer id."""
    return (servers[peer_id].public_name if peer_id in servers else "") or short_peer(peer_id)
