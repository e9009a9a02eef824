"""Watches that a server which is announced as ONLINE is so: that it computes, and that others can find it.

A server that cannot be found announces itself again. One that no longer computes ends, loudly: whoever runs it starts
it anew, and clients go elsewhere; a process that lives on and serves nobody helps nobody. Knows nothing of moves.
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from p2pswarm.core.errors import SwarmingError
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.directory.directory import Directory
from p2pswarm.rpc.limits import DEFAULT_RPC_LIMITS
from swarmd.events import Events
from swarmd.presence import Presence

PERIOD_S = 30.0
"""As often as announcements are renewed: less and a client might see the gap first."""
PROBE_TIMEOUT_S = DEFAULT_RPC_LIMITS.call_timeout_s
"""No client is let wait for longer."""
PROBE_TRIES, PROBE_RETRY_S = 2, 5.0
ANNOUNCE_TIMEOUT_S = 60.0
"""Far above what the slowest holders of an announcement may take."""
MAX_STUCK_ANNOUNCEMENTS = 3

logger = logging.getLogger(__name__)


class ServerFailure(SwarmingError):
    """This server cannot serve any more: it has to be started anew."""


async def check_computing(probe: Callable[[], Awaitable[None]]) -> None:
    """Raises `ServerFailure` when `probe`, a step through the span, fails or takes longer than any client waits."""
    for tries_left in reversed(range(PROBE_TRIES)):
        try:
            with trio.fail_after(PROBE_TIMEOUT_S):
                await probe()
            return
        except trio.TooSlowError as error:
            raise ServerFailure(f"the device has not answered a single token for {PROBE_TIMEOUT_S:.0f} s") from error
        except Exception as error:  # whatever the device throws at a client, it throws here first
            logger.exception("a step through our own blocks failed")
            if not tries_left:
                raise ServerFailure(f"our blocks do not compute any more: {error or type(error).__name__}") from error
        await trio.sleep(PROBE_RETRY_S)


class Watchdog:
    """Of one span, while it is served."""

    def __init__(
        self,
        presence: Presence,
        directory: Directory,
        probe: Callable[[], Awaitable[None]],
        num_nodes: Callable[[], int],
        events: Events,
    ) -> None:
        """`num_nodes` says how many other nodes of the swarm are known at the moment."""
        self._presence = presence
        self._directory = directory
        self._probe = probe
        self._num_nodes = num_nodes
        self._events = events

    async def run(self) -> None:
        """Until cancelled. Raises `ServerFailure`."""
        num_stuck = 0
        while True:
            await trio.sleep(PERIOD_S)
            await check_computing(self._probe)
            if await self.is_listed() or not self._num_nodes():
                continue  # without others, nobody can list us: `Presence.follow_swarm` waits for them
            self._events("not_listed")
            num_stuck = 0 if await self.announce_again() else num_stuck + 1
            if num_stuck == MAX_STUCK_ANNOUNCEMENTS:
                raise ServerFailure(f"{num_stuck} announcements in a row did not end: nobody can find this server")

    async def is_listed(self) -> bool:
        """Whether the swarm's directory has this server as it is."""
        announced = (await self._directory.servers(self._presence.info.model_id)).get(self._presence.info.peer_id)
        return announced is not None and _who_and_what(announced) == _who_and_what(self._presence.info)

    async def announce_again(self) -> bool:
        """Whether it ended, with however few who took it."""
        with trio.move_on_after(ANNOUNCE_TIMEOUT_S):
            await self._presence.announce(self._presence.info)
            return True
        return False


def _who_and_what(info: ServerInfo) -> tuple[object, ...]:
    """All of an announcement but its figures, which change all the time."""
    return info.span, info.state, info.addresses
