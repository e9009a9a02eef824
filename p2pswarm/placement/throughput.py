"""What servers contribute: a server's own throughput, each block's, the swarm's. Pure; knows nothing of choosing.

A block's throughput is the sum over the servers that hold it or are about to; the swarm's is that of its worst block,
since every text goes through all blocks.
"""

from collections.abc import Iterable

from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span

RELAYED_PART = 0.2
"""Of a line's speed, for a server that is reached through a relay: others pay for that line too (as in Petals)."""
FIRST_THROUGHPUT_TOKENS_PER_S = 1.0
"""Counted for servers that have measured nothing yet where nobody has: more than none, so that newcomers spread."""


def server_throughput(
    num_blocks: int, forward_tokens_per_s: float, network_tokens_per_s: float, *, using_relay: bool = False
) -> float:
    """Tokens per second of a server as a whole, given those through one block and those over its line.

    A request that begins anywhere in the span uses (K + 1) / 2 of its K blocks on average.
    """
    network_part = RELAYED_PART if using_relay else 1.0
    return min(forward_tokens_per_s / ((num_blocks + 1) / 2), network_tokens_per_s * network_part)


def destination(server: ServerInfo) -> Span | None:
    """The blocks that the server holds or is about to hold; None where it is going for good."""
    if server.next_span is not None and server.state is not ServerState.OFFLINE:
        return server.next_span
    return server.span if server.state in (ServerState.JOINING, ServerState.ONLINE) else None


def counted_throughputs(servers: Iterable[ServerInfo]) -> list[tuple[ServerInfo, Span, float]]:
    """Who counts, where, with how many tokens per second; in the order of peer ids.

    Who has not measured itself yet counts like the average of those who have.
    """
    in_order = sorted(servers, key=lambda server: server.peer_id)
    counted = [(server, span) for server in in_order if (span := destination(server)) is not None]
    measured = [server.throughput_tokens_per_s for server, _ in counted if server.throughput_tokens_per_s > 0]
    average = sum(measured) / len(measured) if measured else FIRST_THROUGHPUT_TOKENS_PER_S
    return [(server, span, server.throughput_tokens_per_s or average) for server, span in counted]


def block_throughputs(num_model_blocks: int, servers: Iterable[ServerInfo]) -> list[float]:
    """Tokens per second of each block, summed in the order of peer ids so that all nodes get the same floats."""
    throughputs = [0.0] * num_model_blocks
    for _, span, throughput in counted_throughputs(servers):
        for block_index in range(span.start, min(span.end, num_model_blocks)):
            throughputs[block_index] += throughput
    return throughputs


def swarm_throughput(num_model_blocks: int, servers: Iterable[ServerInfo]) -> float:
    """Tokens per second of the worst-served block; 0 where one is not served at all."""
    return min(block_throughputs(num_model_blocks, servers))
