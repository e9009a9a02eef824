"""When a server leaves its blocks for others, and which. Pure: announcements in, a move or none out.

Every server asks itself this now and then, and nobody else. The answer comes from a plan for the whole swarm (see
`p2pswarm/placement/arrangement.py`): one server after another moves, on paper, to the blocks that are served worst, as
long as that helps; moves that the swarm's throughput does not need are struck out. The plan follows from the
announcements alone, so servers that see the same swarm make the same one and agree on who moves where. It moves if

- the plan makes the swarm's throughput, that of its worst block, higher by enough (`balance_quality`),
- the plan moves this server,
- this move alone does not make things worse, and
- all its blocks have another holder that is online and stays: those who are still loading may fail to.

The last two do not hold a server back while some block is served by nobody and nobody is about to: no text can be made
then, so there is nothing to lose, and the plan is to serve all blocks.

The rest of the plan is for the others, at their next look; they may see a changed swarm by then, and plan anew.

**Several at the same moment.** A server that wants to move first announces so (`ServerInfo.next_span`, still online),
waits until others can have read it, and asks again with a fresh look. Who has announced this counts where it is going.
Only among those who are still waiting like this does the lower peer id go first: for it, the others are where they
are; for them, it has gone. So of two last holders of a block at most one leaves, and a gap is filled once. A server
that is told no at the second look withdraws its announcement, having loaded nothing.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.placement.arrangement import Arrangement, plan
from p2pswarm.placement.throughput import counted_throughputs

UNITS_PER_TOKEN_PER_S = 1000
"""Throughputs are compared in thousandths of a token per second."""
MAX_TOKENS_PER_S = 1e9
"""More is not believed; the sums of ten thousand servers stay below 2^63."""
STAY_BIAS = 1e-3
"""The gain must exceed what is asked for by this much: equal swarms stay as they are."""


@dataclass(frozen=True, slots=True)
class Move:
    """Other blocks for a server, and what the swarm has of it."""

    span: Span
    gain: float
    """How many times its throughput the swarm has when the plan is carried out; infinite where it has none now."""


def should_move(own: ServerInfo, servers: Iterable[ServerInfo], balance_quality: float) -> Move | None:
    """The move of the server `own`, which is online; None where it should stay.

    `servers` are all that are announced for the model, with `own` or without. `balance_quality` is the share of what
    the swarm could have that it is content with: at 0.75 a plan has to promise a third more.
    """
    assert own.state is ServerState.ONLINE, f"only who is online can be asked to move, not who is {own.state.value}"
    if own.is_pinned:
        return None
    everyone = {server.peer_id: server for server in servers} | {own.peer_id: own}
    seen = [_as_seen(server, own) for server in everyone.values() if server.num_model_blocks == own.num_model_blocks]
    counted = counted_throughputs(seen)
    spans = tuple(span for _, span, _ in counted)
    throughputs = tuple(_units(throughput) for _, _, throughput in counted)
    movable = [index for index, (server, _, _) in enumerate(counted) if _may_move(server)]
    own_index = next(index for index, (server, _, _) in enumerate(counted) if server.peer_id == own.peer_id)
    if own.next_span is not None:
        movable.sort(key=lambda index: index != own_index)  # of servers that would do as well, the one that has said so
    contentment = balance_quality - STAY_BIAS
    planned = plan(own.num_model_blocks, spans, throughputs, tuple(movable), contentment)
    span = planned.spans[own_index]
    if span == own.span or planned.minimum_now >= contentment * planned.minimum:
        return None
    if planned.minimum_now == 0:
        return Move(span, math.inf)
    now = Arrangement(own.num_model_blocks, spans, throughputs)
    if not now.is_better_after(own_index, span) or not _can_be_spared(own, seen):
        return None
    return Move(span, planned.minimum / planned.minimum_now)


def _as_seen(server: ServerInfo, own: ServerInfo) -> ServerInfo:
    """The server, staying where it is if it is to make way for `own`; so is `own`, whose future is the question."""
    waits_for_own = server.state is ServerState.ONLINE and own.next_span is not None and server.peer_id > own.peer_id
    return replace(server, next_span=None) if server is own or waits_for_own else server


def _may_move(server: ServerInfo) -> bool:
    return server.state is ServerState.ONLINE and server.next_span is None and not server.is_pinned


def _can_be_spared(own: ServerInfo, servers: Iterable[ServerInfo]) -> bool:
    """Whether each of its blocks has another holder that is there to stay."""
    staying = [
        server.span
        for server in servers
        if server.peer_id != own.peer_id and server.state is ServerState.ONLINE and server.next_span is None
    ]
    return all(any(span.covers(block) for span in staying) for block in range(own.span.start, own.span.end))


def _units(tokens_per_s: float) -> int:
    return max(1, round(min(tokens_per_s, MAX_TOKENS_PER_S) * UNITS_PER_TOKEN_PER_S))
