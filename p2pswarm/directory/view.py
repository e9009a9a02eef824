"""A client's live picture of who serves one model."""

from collections.abc import Mapping
from random import Random

import trio

from p2pswarm.core.clock import Clock
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.dht.node import DhtNode
from p2pswarm.directory.announcement import model_key
from p2pswarm.directory.server_list import ServerList

JITTER = 0.1
"""Refreshes vary by this part, so that clients do not fall into step."""


class ModelView:
    """Looks again every `period_s`, and whenever it is asked to; who expires vanishes at that very moment.

    Only what is new travels: holders are told what is known already.
    """

    def __init__(self, model_id: ModelId, dht: DhtNode, clock: Clock, random: Random, period_s: float) -> None:
        self.model_id = model_id
        self._dht = dht
        self._clock = clock
        self._random = random
        self._period_s = period_s
        self._list = ServerList(model_id)
        self._servers: Mapping[PeerId, ServerInfo] = {}
        self._changed = trio.Event()
        self._renewed = trio.Event()

    @property
    def servers(self) -> Mapping[PeerId, ServerInfo]:
        """All servers that are joining, online or draining. A new mapping after each change."""
        return self._servers

    @property
    def online(self) -> Mapping[PeerId, ServerInfo]:
        """The servers that take requests."""
        return {peer_id: info for peer_id, info in self._servers.items() if info.state is ServerState.ONLINE}

    async def wait_changed(self) -> None:
        """Returns when `servers` next differs from what it is now."""
        await self._changed.wait()

    async def refresh(self) -> None:
        """Asks the swarm now; returns when the answer is in `servers`."""
        records = await self._dht.get(model_key(self.model_id), self._list.records())
        self._list.take(records.values())
        self._update()
        self._renewed.set()

    def mark_offline(self, peer_id: PeerId) -> None:
        """Leaves out a server found dead, until it announces itself anew."""
        self._list.mark_offline(peer_id)
        self._update()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the view true until cancelled; has `started` after the first look."""
        async with trio.open_nursery() as nursery:
            await self.refresh()
            nursery.start_soon(self._expire)
            task_status.started()
            while True:
                await trio.sleep(self._period_s * self._random.uniform(1 - JITTER, 1 + JITTER))
                await self.refresh()

    async def _expire(self) -> None:
        while True:
            self._renewed = trio.Event()
            with trio.move_on_after(max(0.0, self._list.next_expiry_unix_s - self._clock.unix_time_s())):
                await self._renewed.wait()
            self._update()

    def _update(self) -> None:
        self._list.expire(self._clock.unix_time_s())
        servers = self._list.servers()
        if servers != self._servers:
            self._servers = servers
            self._changed.set()
            self._changed = trio.Event()
