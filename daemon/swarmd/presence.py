"""What the swarm is told of this server, kept true: state, figures, addresses, and all of it anew after an outage."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import trio

from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.directory.announcer import Announcer
from swarmd.events import Events
from swarmd.figures import Figures

FIGURES_CHECK_PERIOD_S = 2.0
"""How old a wrong figure may be; a busy server announces at most this often."""
SWARM_CHECK_PERIOD_S = 5.0


class Reach(Protocol):
    """`swarmd/reaching.py`: how others reach this node."""

    @property
    def next_change(self) -> trio.Event: ...

    async def wait_settled(self) -> None: ...

    def stamped(self, info: ServerInfo) -> ServerInfo: ...


class Presence:
    """The server's announcement, and who changes it."""

    def __init__(self, announcer: Announcer, info: ServerInfo, reach: Reach) -> None:
        self._announcer = announcer
        self._reach = reach
        self.info = info
        """As last announced."""

    async def become(self, state: ServerState) -> None:
        """Announces the state; returns when others can read it."""
        await self.announce(replace(self.info, state=state))

    async def announce(self, info: ServerInfo) -> None:
        """With where we are reached now; not before that is known."""
        self.info = info
        await self._reach.wait_settled()
        self.info = self._reach.stamped(self.info)
        await self._announcer.announce(self.info)

    async def follow_reach(self) -> None:
        """Announces anew when others reach us in another way than before."""
        while True:
            change = self._reach.next_change
            if self._reach.stamped(self.info) != self.info:
                await self.announce(self.info)
            await change.wait()

    async def follow_figures(self, figures: Figures) -> None:
        """Corrects the announced figures when they have changed so far that clients would choose differently."""
        while True:
            await trio.sleep(FIGURES_CHECK_PERIOD_S)
            correction = figures.correction(self.info)
            if correction is not None:
                await self.announce(correction)

    async def follow_swarm(self, num_nodes: Callable[[], int], events: Events) -> None:
        """Tells once when all other nodes are lost, and announces anew when some are back.

        The way back itself is the DHT's to find; `num_nodes` says how many others it knows at the moment.
        """
        has_company = num_nodes() > 0
        while True:
            await trio.sleep(SWARM_CHECK_PERIOD_S)
            had_company, has_company = has_company, num_nodes() > 0
            if had_company and not has_company:
                events("swarm_lost")
            elif has_company and not had_company:
                events("swarm_found", num_peers=num_nodes())
                await self.announce(self.info)
