"""Asking the router, by UPnP, to forward a port to this machine. Most home routers do as they are told.

miniupnpc does the talking, in a thread, since it blocks. A router's word is not believed: whether the port really leads
here is found out by a probe (`net/nat/probing.py`); behind two routers it does not.
"""

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import trio

SEARCHED_AT = ("239.255.255.250", 1900)
"""Where routers listen for those who look for them (SSDP)."""
DISCOVERY_MS = 500
"""For an answer to each of four kinds of search: 2 s where there is no such router."""
MAPPING_TIMEOUT_S = 8.0
"""For discovery and mapping together; then the thread is left to itself."""
UNMAP_TIMEOUT_S = 2.0
LEASE_S = 3600
"""So that a router forgets a machine that has gone; renewed at half of it."""
DESCRIPTION = "p2pswarm"
MAX_TRIES = 4
"""Of external ports: first the same number as here, then some at random."""
EPHEMERAL_PORTS = (20000, 60000)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MappedPort:
    """A port of the router's that leads to one of ours, by the router's word."""

    internal: int
    external: int


class PortMapper:
    """Holds at most one mapping."""

    def __init__(self, random: Random, find_router: Callable[[], Any] | None = None) -> None:
        """`find_router` blocks, and returns miniupnpc's object for a router, or raises."""
        self._random = random
        self._find_router = find_router or _find_router
        self._router: Any = None
        self.mapped: MappedPort | None = None
        self.renew_at_s = 0.0

    async def map(self, port: int) -> MappedPort | None:
        """Has a port of the router's lead to `port` here, or renews that; None where there is no router that would."""
        wanted = [port, *(self._random.randrange(*EPHEMERAL_PORTS) for _ in range(MAX_TRIES - 1))]
        if self.mapped is not None and self.mapped.internal == port:
            wanted = [self.mapped.external]
        self.mapped = None
        with trio.move_on_after(MAPPING_TIMEOUT_S):
            external = await trio.to_thread.run_sync(partial(self._map, port, wanted), abandon_on_cancel=True)
            if external is not None:
                self.mapped = MappedPort(port, external)
                self.renew_at_s = trio.current_time() + LEASE_S / 2
        return self.mapped

    @property
    def is_due(self) -> bool:
        """Whether there is a mapping to be renewed."""
        return self.mapped is not None and trio.current_time() >= self.renew_at_s

    async def unmap(self) -> None:
        """Takes the mapping back, if there is one. Done even when cancelled, within `UNMAP_TIMEOUT_S`."""
        mapped, self.mapped = self.mapped, None
        if mapped is not None:
            with trio.move_on_after(UNMAP_TIMEOUT_S, shield=True):
                await trio.to_thread.run_sync(self._unmap, mapped.external, abandon_on_cancel=True)

    def _map(self, port: int, wanted: list[int]) -> int | None:
        try:
            if self._router is None:
                self._router = self._find_router()
            external = next((one for one in wanted if self._try(one, port)), None)
        except Exception as error:  # noqa: BLE001 - a border: miniupnpc raises bare `Exception` for all that goes wrong
            logger.info("no router forwards a port to this machine by UPnP: %s", error)
            self._router = None
            return None
        logger.info("the router forwards port %s to port %d here", external, port)
        return external

    def _try(self, external: int, port: int) -> bool:
        """Some routers know only mappings without an end."""
        return any(self._add(external, port, lease_s) for lease_s in (LEASE_S, 0))

    def _add(self, external: int, port: int, lease_s: int) -> bool:
        try:
            return bool(
                self._router.addportmapping(external, "TCP", self._router.lanaddr, port, DESCRIPTION, "", lease_s)
            )
        except Exception as error:  # noqa: BLE001 - as above: the port is taken, or the lease is not to its taste
            logger.debug("the router refuses port %d for %d s: %s", external, lease_s, error)
            return False

    def _unmap(self, external: int) -> None:
        try:
            self._router.deleteportmapping(external, "TCP")
        except Exception as error:  # noqa: BLE001 - as above: the lease ends by itself
            logger.info("the router goes on forwarding port %d: %s", external, error)


def _find_router() -> Any:
    import miniupnpc  # compiled, and hardly ever needed

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:  # miniupnpc would complain on stderr by itself
        asking.connect(SEARCHED_AT)
    upnp = miniupnpc.UPnP()
    upnp.discoverdelay = DISCOVERY_MS
    upnp.discover()
    upnp.selectigd()
    return upnp
