"""Which blocks a server takes that was not told which: the window that the swarm serves worst. Pure.

A block's throughput is the sum over the servers that hold it or are about to; the swarm's is that of its worst block.
So windows are compared by their sorted block throughputs, worst first (the rule of Petals' `block_selection.py`);
ties go to the front.
"""

from collections.abc import Iterable

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span

COUNTED_STATES = (ServerState.JOINING, ServerState.ONLINE)
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


def block_throughputs(num_model_blocks: int, servers: Iterable[ServerInfo]) -> list[float]:
    """Tokens per second of each block, summed in the order of peer ids so that all nodes get the same floats."""
    throughputs = [0.0] * num_model_blocks
    for server in sorted(servers, key=lambda server: server.peer_id):
        if server.state in COUNTED_STATES:
            for block_index in range(server.span.start, min(server.span.end, num_model_blocks)):
                throughputs[block_index] += server.throughput_tokens_per_s
    return throughputs


def num_blocks_that_fit(free_bytes: int, bytes_per_block: int, num_model_blocks: int) -> int:
    """How many blocks to load, at least one, on a device with so much free memory."""
    return max(1, min(num_model_blocks, int(free_bytes * FREE_MEMORY_FOR_WEIGHTS) // max(bytes_per_block, 1)))
