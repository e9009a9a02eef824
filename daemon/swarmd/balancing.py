"""Finds out whether the swarm would be served better if this server held other blocks; carefully, since a move costs
its sessions their caches and everybody the server while it loads.

Whether a move helps is decided by the pure rules of `p2pswarm/placement`. This is the shell around them:

- looks come at random intervals, so that servers which see the same gap do not all jump at it;
- servers that do not answer do not count, although their announcements are still there: that of a killed server is for
  a minute and a half;
- a second look, some time later, must say the same;
- then the server announces that it is leaving (DRAINING, still serving) and looks a third time, so that of several that
  want to move at one moment one goes first. The others stay, and look again at their next turn.
"""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import trio

from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from swarmd.block_choice import block_throughputs, worst_served_span
from swarmd.presence import Presence

SECOND_LOOK_SHARE = 0.25
"""Of the mean period between checks: how long after the first look the second one comes, on average."""
SHORTEST_WAIT_S = 0.2
MAX_RESTS = 6
"""Failed moves double the period up to 64 times: an hour where it is a minute."""


@dataclass(frozen=True, slots=True)
class Move:
    """Other blocks for this server, and what the swarm has of it."""

    span: Span
    gain: float
    """How many times its throughput the swarm has afterwards, as predicted."""


Look = Callable[[], Awaitable[Sequence[ServerInfo]]]
"""The other servers that live."""
Decide = Callable[[ServerInfo, Sequence[ServerInfo]], Move | None]
"""Whether the first server, online, should move, given the others."""


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
        """Returns when this server should move, and has told the others that it is leaving its blocks."""
        while True:
            await trio.sleep(self._random.uniform(0, 2 * self._period_s * 2 ** min(self._num_failed, MAX_RESTS)))
            move = await self._agreed_move()
            if move is not None:
                return move

    def note(self, has_moved: bool) -> None:
        """How the last move ended: after failures the next look comes later and later."""
        self._num_failed = 0 if has_moved else self._num_failed + 1

    async def _agreed_move(self) -> Move | None:
        if self._decide(self._online(), await self._look()) is None:
            return None
        await trio.sleep(SECOND_LOOK_SHARE * self._random.uniform(0, 2 * self._period_s))
        if self._decide(self._online(), await self._look()) is None:
            return None
        told_at_s = trio.current_time()
        await self._presence.become(ServerState.DRAINING)
        # Who looked before our word was out has sent its own when as much time again has passed, if it is as fast.
        await trio.sleep(max(SHORTEST_WAIT_S, 2 * (trio.current_time() - told_at_s)))
        others = await self._look()
        move = self._decide(self._online(), others)
        if move is None or not is_first(self._presence.info, others):
            await self._presence.become(ServerState.ONLINE)
            return None
        return move

    def _online(self) -> ServerInfo:
        return replace(self._presence.info, state=ServerState.ONLINE)


def reason_to_move(
    own: ServerInfo, others: Sequence[ServerInfo], *, balance_quality: float, random: Random
) -> Move | None:
    """The move of the server `own` that makes the swarm's throughput enough higher; None where there is none."""
    num_blocks = own.num_model_blocks
    holders = [other.span for other in others if other.state is ServerState.ONLINE]
    is_needed = any(not any(span.covers(block) for span in holders) for block in range(own.span.start, own.span.end))
    throughput = min(block_throughputs(num_blocks, [own, *others]))
    span = worst_served_span(num_blocks, own.span.num_blocks, others)
    moved = min(block_throughputs(num_blocks, [replace(own, span=span), *others]))
    if is_needed or span == own.span or not throughput < balance_quality * moved:
        return None
    return Move(span, moved / throughput if throughput else math.inf)


def is_first(own: ServerInfo, others: Sequence[ServerInfo]) -> bool:
    """Whether the server is the one to go, of those that are leaving their blocks at this moment."""
    leaving = [server.peer_id for server in others if server.state is ServerState.DRAINING]
    return all(own.peer_id < peer_id for peer_id in leaving)
