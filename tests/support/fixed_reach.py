"""A server that is reached as it says in its announcement, from the beginning: for tests of all else."""

import trio

from p2pswarm.core.server_info import ServerInfo


class FixedReach:
    """Implements `swarmd.presence.Reach`."""

    def __init__(self) -> None:
        self.next_change = trio.Event()

    async def wait_settled(self) -> None:
        await trio.lowlevel.checkpoint()

    def stamped(self, info: ServerInfo) -> ServerInfo:
        return info
