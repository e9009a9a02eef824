"""Routes for throughput: another one each time, so that every server gets work as it can carry it.

For training and other parallel passes, where many calls are under way at once and the fastest route would only be a
queue. From block to block a server is drawn among those that hold it, in proportion to the throughput each declares,
and runs all that it holds from there.
"""

import math
from collections.abc import Sequence
from random import Random

from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.routing.route import Hop

SMALLEST_WEIGHT = 1e-6
"""For a server that declares no throughput: only where there is nobody else."""


def spread_hops(span: Span, usable: Sequence[ServerInfo], random: Random) -> tuple[Hop, ...]:
    """Hops through the span, whose blocks must all be held by usable servers."""
    hops = []
    reached = span.start
    while reached < span.end:
        holders = sorted((one for one in usable if one.span.covers(reached)), key=lambda one: one.peer_id)
        (chosen,) = random.choices(holders, [_weight(one) for one in holders])
        end = min(chosen.span.end, span.end)
        hops.append(Hop(chosen.peer_id, Span(reached, end)))
        reached = end
    return tuple(hops)


def _weight(server: ServerInfo) -> float:
    rate = server.throughput_tokens_per_s
    return rate if math.isfinite(rate) and rate > SMALLEST_WEIGHT else SMALLEST_WEIGHT
