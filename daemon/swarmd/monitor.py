"""Watches a server at work: asks its parts for their figures, and tells them to those who want to know: clients who
ask, and if the operator says so, a line of events now and then, and Prometheus.
"""

import trio

from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_load import ServerLoad
from p2pswarm.net.traffic import Traffic
from p2pswarm.rpc.server import RpcServer
from swarmd.config import ServerConfig
from swarmd.events import Events
from swarmd.metrics_server import MetricsServer
from swarmd.presence import Presence
from swarmd.served_span import CurrentSpan
from swarmd.span_life import SpanLife
from swarmd.statistics import RecentTokens, ServerStatistics

SAMPLE_PERIOD_S = 5.0


class Monitor:
    """Knows where the figures are. Tokens per second are known while `run` runs."""

    def __init__(
        self, presence: Presence, current: CurrentSpan, rpc: RpcServer, life: SpanLife, traffic: Traffic
    ) -> None:
        self._presence = presence
        self._current = current
        self._rpc = rpc
        self._life = life
        self._traffic = traffic
        self._recent = RecentTokens()
        self._began_at_s = trio.current_time()

    def statistics(self) -> ServerStatistics:
        """As they are now."""
        return ServerStatistics(
            uptime_s=trio.current_time() - self._began_at_s,
            info=self._presence.info,
            rpc=self._rpc.statistics(),
            moves=self._life.statistics(),
            traffic=Traffic(self._traffic.sent_bytes, self._traffic.received_bytes),
            engine=self._current.statistics(),
            tokens_per_s=self._recent.per_s(),
        )

    def load(self) -> ServerLoad:
        """For anybody who asks."""
        return self.statistics().load()

    async def run(
        self, config: ServerConfig, events: Events, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Tells whom `config` names, until cancelled. Raises `ConfigError` where it cannot listen for them."""
        self._current.describe_load = self.load
        async with open_transparent_nursery() as nursery:
            nursery.start_soon(self._sample)
            if config.metrics is not None:
                from swarmd.metrics import metrics_page  # imports prometheus_client

                url = await nursery.start(MetricsServer(metrics_page(self.statistics)).run, config.metrics)
                events("metrics", url=url)
            if config.stats_period_s:
                nursery.start_soon(self._tell, events, config.stats_period_s)
            task_status.started()

    async def _sample(self) -> None:
        while True:
            engine = self._current.statistics()
            if engine is not None:
                self._recent.note(engine.dispatcher.num_tokens, trio.current_time())
            await trio.sleep(SAMPLE_PERIOD_S)

    async def _tell(self, events: Events, period_s: float) -> None:
        while True:
            await trio.sleep(period_s)
            events("statistics", **self.statistics().as_fields())
