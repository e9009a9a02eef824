"""By which way this client comes to its servers: directly, through a relay, or through one first and then past it."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import trio

from p2pswarm.core.ids import PeerId
from p2pswarm.core.reachability import Reachability
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.net.network import Network
from p2pswarm.routing.route import short_peer

LOOK_PERIOD_S = 0.02
DIRECT_TIMEOUT_S = 3.0
"""For a way past the relay to open, if it does: routers that allow it take part of a second."""


@dataclass(frozen=True, slots=True)
class FoundPath:
    """How one server was reached while we looked."""

    relay: PeerId | None
    """Through whom at first; None: directly."""
    direct_after_s: float | None = None
    """How long it took until a way past the relay was open; None: none was."""


class PathWatch:
    """Notes the ways to servers while `run` runs."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._relayed_at_s: dict[PeerId, float] = {}
        self._directly: dict[PeerId, trio.Event] = {}
        self.found: dict[PeerId, FoundPath] = {}

    async def run(self, peers: Collection[PeerId]) -> None:
        """Until cancelled; start it before the first of them is dialled."""
        while True:
            for peer_id in peers:
                self._look(peer_id)
            await trio.sleep(LOOK_PERIOD_S)

    async def wait_direct(self, peers: Iterable[PeerId]) -> None:
        """Returns when all that are reached are so directly, or have been relayed for `DIRECT_TIMEOUT_S`."""
        for peer_id in peers:
            if peer_id in self._relayed_at_s:
                with trio.move_on_at(self._relayed_at_s[peer_id] + DIRECT_TIMEOUT_S):
                    await self._directly[peer_id].wait()

    def _look(self, peer_id: PeerId) -> None:
        path, found = self._network.path(peer_id), self.found.get(peer_id)
        if path is None:
            return
        if found is None and path.left_relay is not None:  # between two looks
            self.found[peer_id] = FoundPath(path.left_relay, direct_after_s=LOOK_PERIOD_S)
        elif found is None:
            self.found[peer_id] = FoundPath(path.relay)
            if not path.is_direct:
                self._relayed_at_s[peer_id] = trio.current_time()
                self._directly[peer_id] = trio.Event()
        elif path.is_direct and found.relay is not None and found.direct_after_s is None:
            took_s = trio.current_time() - self._relayed_at_s[peer_id]
            self.found[peer_id] = replace(found, direct_after_s=round(took_s, 3))
            self._directly[peer_id].set()


def as_reached(servers: Iterable[ServerInfo], network: Network) -> list[ServerInfo]:
    """The announcements, without a relay where there is a way past it from here."""
    return [
        replace(server, using_relay=False)
        if server.using_relay and (path := network.path(server.peer_id)) is not None and path.is_direct
        else server
        for server in servers
    ]


def path_as_json(peer_id: PeerId, found: FoundPath | None) -> dict[str, Any]:
    """What `--json` prints of the way to one server; `reached` is false where it did not answer."""
    if found is None:
        return {"peer_id": peer_id, "reached": False, "relay": None, "direct_after_s": None}
    return {"peer_id": peer_id, "reached": True, "relay": found.relay, "direct_after_s": found.direct_after_s}


def path_in_words(found: FoundPath | None) -> str:
    """`directly`, `through relay …abc`, or `through relay …abc, then directly after 0.4 s`."""
    if found is None:
        return "not reached"
    if found.relay is None:
        return "directly"
    after = "" if found.direct_after_s is None else f", then directly after {found.direct_after_s:.1f} s"
    return f"through relay {short_peer(found.relay)}{after}"


def announced_reach(server: ServerInfo) -> str:
    """How a server says that it is reached: `directly`, `through …abc, …def`, or `unknown`."""
    if server.using_relay:
        return f"through {', '.join(map(short_peer, announced_relays(server))) or 'no relay yet'}"
    return "directly" if server.reachability is Reachability.PUBLIC else "unknown"


def announced_relays(server: ServerInfo) -> list[PeerId]:
    """The relays among the ways to a server, in order."""
    circuits = (address.partition("/p2p-circuit") for address in server.addresses)
    relays = (PeerId(relay.rpartition("/p2p/")[2]) for relay, is_circuit, _ in circuits if is_circuit)
    return list(dict.fromkeys(relays))
