"""Finds out whether the swarm would be served better if this server held other blocks; carefully, since a move costs
its sessions their caches and everybody the server while it loads.

Whether a move helps is decided in `p2pswarm/placement/rebalancing.py`. This is the shell around it:

- looks come at random intervals, so that servers which see the same gap do not all jump at it;
- servers that do not answer do not count, although their announcements are still there: that of a killed server is for
  a minute and a half;
- a second look, some time later, must say the same;
- then the server announces where it is about to go, still serving, and looks a third time, so that of several that want
  to move at one moment one goes first. The others stay, and look again at their next turn.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from random import Random

import trio

from p2pswarm.core.server_info import ServerInfo
from p2pswarm.placement.rebalancing import Move
from swarmd.presence import Presence

SECOND_LOOK_SHARE = 0.25
"""Of the mean period between checks: how long after the first look the second one comes, on average."""
SHORTEST_WAIT_S = 0.2
MAX_RESTS = 6
"""Failed moves double the period up to 64 times: half an hour where it is half a minute."""


Look = Callable[[], Awaitable[Sequence[ServerInfo]]]
"""The other servers that live."""
Decide = Callable[[ServerInfo, Sequence[ServerInfo]], Move | None]
"""Whether the first server, which is online, should move, given the others (`placement.rebalancing.should_move`)."""


class Balancing:
    """Looks for a reason to move the server of `presence`."""

    def __init__(self, presence: Presence, look: Look, decide: Decide, random: Random, period_s: float) -> None:
        self._presence = presence
        self._look = look
        self._decide = decide
        self._random = random
        self._period_s = period_s
        self._num_failed = 0

    async def next_move(self) -> Move:
        """Returns when this server should move, and has told the others where it is about to go."""
        while True:
            await trio.sleep(self._random.uniform(0, 2 * self._period_s * 2 ** min(self._num_failed, MAX_RESTS)))
            move = await self._agreed_move()
            if move is not None:
                return move

    def note(self, has_moved: bool) -> None:
        """How the last move ended: after failures the next look comes later and later."""
        self._num_failed = 0 if has_moved else self._num_failed + 1

    async def _agreed_move(self) -> Move | None:
        if self._decide(self._presence.info, await self._look()) is None:
            return None
        await trio.sleep(SECOND_LOOK_SHARE * self._random.uniform(0, 2 * self._period_s))
        wanted = self._decide(self._presence.info, await self._look())
        if wanted is None:
            return None
        told_at_s = trio.current_time()
        await self._presence.announce(replace(self._presence.info, next_span=wanted.span))
        # Who looked before our word was out has sent its own when as much time again has passed, if it is as fast.
        await trio.sleep(max(SHORTEST_WAIT_S, 2 * (trio.current_time() - told_at_s)))
        move = self._decide(self._presence.info, await self._look())
        if move is None:
            await self._presence.announce(replace(self._presence.info, next_span=None))
            return None
        return move
