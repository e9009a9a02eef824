"""Takes the blocks that the swarm needs most, and makes way for others who do so at the same moment.

What is chosen is decided in `p2pswarm/placement/joining.py`.
"""

from dataclasses import replace

import trio

from p2pswarm.core.server_info import ServerState
from p2pswarm.directory.directory import Directory
from p2pswarm.placement.joining import settled_span, worst_served_span
from swarmd.presence import Presence

SHORTEST_WAIT_S = 0.2
MAX_LOOKS = 3
"""More than one only for who has moved, to where others may have moved too. Simulated with servers that started within
half a second of each other (`tests/swarmd/test_block_taking.py`): without a second look 146 of 240 swarms had blocks
left over, with one 5, with two none."""


async def take_worst_served(num_blocks: int, presence: Presence, directory: Directory) -> None:
    """Announces as joining with `num_blocks` blocks; `presence.info.span` says which. Raises `ConfigError`."""
    info = presence.info
    looked_at_s = trio.current_time()
    servers = await directory.servers(info.model_id)
    span = worst_served_span(info.num_model_blocks, num_blocks, servers.values())
    await presence.announce(replace(info, span=span, state=ServerState.JOINING))
    # Who looked before our word was out has sent its own when as much time again has passed, if it is as fast.
    await make_way(presence, directory, trio.current_time() - looked_at_s)


async def make_way(presence: Presence, directory: Directory, wait_s: float = 0.0) -> None:
    """For a server announced as joining: takes other blocks where one of lower peer id is joining with the same."""
    for _ in range(MAX_LOOKS):
        await trio.sleep(max(SHORTEST_WAIT_S, wait_s))
        looked_at_s = trio.current_time()
        servers = await directory.servers(presence.info.model_id)
        span = settled_span(presence.info, servers.values())
        if span == presence.info.span:
            break
        await presence.announce(replace(presence.info, span=span))
        wait_s = trio.current_time() - looked_at_s
