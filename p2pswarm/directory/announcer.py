"""Keeps one server's announcement in the DHT: at once when something changes, again before it expires, withdrawn at
the end."""

from dataclasses import dataclass, replace
from random import Random

import trio

from p2pswarm.core.clock import Clock
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import ModelId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.dht.node import DhtNode
from p2pswarm.dht.record import make_record
from p2pswarm.directory.announcement import MODELS_KEY, Listing, encode_listing, model_key
from p2pswarm.net.network import Network
from p2pswarm.wire.server_info import encode_server_info

JITTER = 0.1
"""Renewals vary by this part, so that servers that started together do not announce together."""


@dataclass(frozen=True, slots=True)
class AnnouncerConfig:
    lifetime_s: float = 90.0
    """How long a server that dies without a word is still announced. Renewed at a third of it, so that one renewal
    may fail."""
    retry_s: float = 2.0
    """Until the next try when no node took the announcement."""
    withdraw_timeout_s: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.retry_s < self.lifetime_s or self.withdraw_timeout_s <= 0:
            raise ConfigError(f"wanted 0 < retry_s < lifetime_s and withdraw_timeout_s > 0, got {self}")


DEFAULT_CONFIG = AnnouncerConfig()


class Announcer:
    """Announces in `announce`; renews while `run` runs."""

    def __init__(
        self, dht: DhtNode, network: Network, clock: Clock, random: Random, config: AnnouncerConfig = DEFAULT_CONFIG
    ) -> None:
        self._dht = dht
        self._network = network
        self._clock = clock
        self._random = random
        self._config = config
        self._info: ServerInfo | None = None
        self._sequence = 0
        self._turn = trio.Lock()
        self._renewal = trio.CancelScope()
        self._renew_at_s = 0.0
        self._announced = trio.Event()

    @property
    def info(self) -> ServerInfo | None:
        """What is announced now; None before the first time and after `withdraw`."""
        return self._info

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Renews what is announced, until cancelled."""
        task_status.started()
        while True:
            if self._info is None:
                self._announced = trio.Event()
                await self._announced.wait()
            await trio.sleep_until(self._renew_at_s)
            async with self._turn:
                if self._info is not None and trio.current_time() >= self._renew_at_s:
                    with trio.CancelScope() as self._renewal:
                        await self._publish(self._info)

    async def announce(self, info: ServerInfo) -> int:
        """Makes `info` known, from now until it changes or `withdraw`; how many nodes hold it.

        Without addresses it gets the network's own. Another model than before: the server is withdrawn from that one.
        Cancelled, it is still announced by `run`.
        """
        if info.peer_id != self._network.peer_id:
            raise ConfigError(f"{self._network.peer_id} cannot announce another server, {info.peer_id}")
        if not info.addresses:
            info = replace(info, addresses=self._network.addresses)
        async with self._turn:
            before, self._info = self._info, info
            self._announced.set()
            if before is not None and before.model_id != info.model_id:
                await self._put_info(replace(before, state=ServerState.OFFLINE))
            return await self._publish(info)

    async def withdraw(self) -> None:
        """Announces that the server is going, and stops renewing. Takes `withdraw_timeout_s` at most, even when
        cancelled."""
        info, self._info = self._info, None
        if info is None:
            return
        self._renewal.cancel()  # it may wait for somebody who hangs
        with trio.move_on_after(self._config.withdraw_timeout_s, shield=True):
            async with self._turn:
                await self._publish(replace(info, state=ServerState.OFFLINE))

    async def _publish(self, info: ServerInfo) -> int:
        num_holders = 0

        async def put_info() -> None:
            nonlocal num_holders
            num_holders = await self._put_info(info)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(put_info)
            nursery.start_soon(self._put_listing, info.model_id, info)
        wait_s = self._config.lifetime_s / 3 if num_holders else self._config.retry_s
        self._renew_at_s = trio.current_time() + wait_s * self._random.uniform(1 - JITTER, 1 + JITTER)
        return num_holders

    async def _put_info(self, info: ServerInfo) -> int:
        return await self._put(model_key(info.model_id), encode_server_info(info))

    async def _put_listing(self, model_id: ModelId, info: ServerInfo) -> None:
        is_listed = info.state is not ServerState.OFFLINE
        await self._put(MODELS_KEY, encode_listing(Listing(model_id, info.num_model_blocks, is_listed)))

    async def _put(self, key: bytes, value: bytes) -> int:
        expires_unix_s = self._clock.unix_time_s() + self._config.lifetime_s
        return await self._dht.put(make_record(self._network, key, value, self._next_sequence(), expires_unix_s))

    def _next_sequence(self) -> int:
        """Rises with every record, and from one run of the server to the next: a calendar in milliseconds, or one
        more."""
        self._sequence = max(self._sequence + 1, round(self._clock.unix_time_s() * 1000))
        return self._sequence
