"""Which blocks a server takes that has none yet: the window that the swarm serves worst. Pure.

Windows are compared by their sorted block throughputs, worst first (the rule of Petals' `block_selection.py`); ties go
to the front.

Servers that start at the same moment see the same gap and would all fill it. So each announces its choice, looks again,
and those whose blocks somebody with a lower peer id has chosen too move on (`settled_span`). Nobody is asked: all see
the same announcements and come to the same answer. `swarmd/block_taking.py` does the looking.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.placement.throughput import block_throughputs
from p2pswarm.placement.windows import worst_window


def worst_served_span(num_model_blocks: int, num_blocks: int, servers: Iterable[ServerInfo]) -> Span:
    """The `num_blocks` adjacent blocks to serve, given what others announce. Raises `ConfigError`."""
    if num_blocks > num_model_blocks:
        raise ConfigError(f"the model has {num_model_blocks} blocks, so --num-blocks {num_blocks} is too many")
    start = worst_window(np.array(block_throughputs(num_model_blocks, servers)), num_blocks)
    return Span(start, start + num_blocks)


def settled_span(own: ServerInfo, servers: Iterable[ServerInfo]) -> Span:
    """The blocks for a server that has announced `own` as joining, now that it sees who else is."""
    everyone = {server.peer_id: server for server in servers} | {own.peer_id: own}
    in_order = [everyone[peer_id] for peer_id in sorted(everyone)]
    moving = [server for server in in_order if _has_to_move(server, in_order)]
    settled = [server for server in in_order if server not in moving]
    for server in moving:
        span = worst_served_span(own.num_model_blocks, server.span.num_blocks, settled)
        if server is own:
            return span
        settled.append(replace(server, span=span))
    return own.span


def _has_to_move(server: ServerInfo, servers: Iterable[ServerInfo]) -> bool:
    """Whether it is joining with blocks that one of lower peer id is joining with too."""
    return server.state is ServerState.JOINING and any(
        other.state is ServerState.JOINING and other.peer_id < server.peer_id and other.span.overlaps(server.span)
        for other in servers
    )
