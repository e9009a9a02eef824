"""Which blocks a server takes that was not told which: the window that the swarm serves worst. Pure.

A block's throughput is the sum over the servers that hold it or are about to; the swarm's is that of its worst block.
So windows are compared by their sorted block throughputs, worst first (the rule of Petals' `block_selection.py`);
ties go to the front.

Servers that start at the same moment see the same gap and would all fill it. So each announces its choice, looks again,
and those whose blocks somebody with a lower peer id has chosen too move on (`settled_span`). Nobody is asked: all see
the same announcements and come to the same answer. `swarmd/block_taking.py` does the looking.
"""

from collections.abc import Iterable
from dataclasses import replace

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span

COUNTED_STATES = (ServerState.JOINING, ServerState.ONLINE)
FIRST_THROUGHPUT_TOKENS_PER_S = 1.0
"""Counted for servers that have measured nothing yet where nobody has: more than none, so that newcomers spread."""
FREE_MEMORY_FOR_WEIGHTS = 0.6
"""The rest is for the KV cache, activations and the machine's other work."""


def worst_served_span(num_model_blocks: int, num_blocks: int, servers: Iterable[ServerInfo]) -> Span:
    """The `num_blocks` adjacent blocks to serve, given what others announce. Raises `ConfigError`."""
    if num_blocks > num_model_blocks:
        raise ConfigError(f"the model has {num_model_blocks} blocks, so --num-blocks {num_blocks} is too many")
    throughputs = block_throughputs(num_model_blocks, servers)

    def badness(start: int) -> tuple[list[float], int]:
        return sorted(throughputs[start : start + num_blocks]), start

    start = min(range(num_model_blocks - num_blocks + 1), key=badness)
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


def block_throughputs(num_model_blocks: int, servers: Iterable[ServerInfo]) -> list[float]:
    """Tokens per second of each block, summed in the order of peer ids so that all nodes get the same floats.

    Who has not measured itself yet counts like the average of those who have.
    """
    counted = sorted(
        (server for server in servers if server.state in COUNTED_STATES), key=lambda server: server.peer_id
    )
    measured = [server.throughput_tokens_per_s for server in counted if server.throughput_tokens_per_s > 0]
    average = sum(measured) / len(measured) if measured else FIRST_THROUGHPUT_TOKENS_PER_S
    throughputs = [0.0] * num_model_blocks
    for server in counted:
        for block_index in range(server.span.start, min(server.span.end, num_model_blocks)):
            throughputs[block_index] += server.throughput_tokens_per_s or average
    return throughputs


def num_blocks_that_fit(free_bytes: int, bytes_per_block: int, num_model_blocks: int) -> int:
    """How many blocks to load, at least one, on a device with so much free memory."""
    return max(1, min(num_model_blocks, int(free_bytes * FREE_MEMORY_FOR_WEIGHTS) // max(bytes_per_block, 1)))
