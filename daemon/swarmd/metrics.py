"""A server's statistics in Prometheus' words. Imports prometheus_client, so only who wants the page imports this.

Sums start anew when the server moves to other blocks, which Prometheus takes for a restart, as it should.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from swarmd.engine_statistics import EngineStatistics
from swarmd.statistics import ServerStatistics

Key = TypeVar("Key")

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class ServerCollector(Collector):
    """Asks for the statistics whenever Prometheus asks for the page."""

    def __init__(self, statistics: Callable[[], ServerStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterable[Metric]:
        statistics = self._statistics()
        yield from _of_server(statistics)
        if statistics.engine is not None:
            yield from _of_engine(statistics.engine)


def metrics_page(statistics: Callable[[], ServerStatistics]) -> Callable[[], bytes]:
    """Makes the page, in the text format."""
    registry = CollectorRegistry()
    registry.register(ServerCollector(statistics))
    return lambda: generate_latest(registry)


def _of_server(statistics: ServerStatistics) -> Iterable[Metric]:
    rpc, info = statistics.rpc, statistics.info
    labels = {"model_id": info.model_id, "blocks": str(info.span), "state": info.state.value, "version": info.version}
    about = GaugeMetricFamily("swarmd_info", "What the server announces", labels=list(labels))
    about.add_metric(list(labels.values()), 1)
    yield about
    yield GaugeMetricFamily("swarmd_uptime_seconds", "Since the server began", statistics.uptime_s)
    yield GaugeMetricFamily("swarmd_sessions", "Open sessions", rpc.num_sessions)
    yield GaugeMetricFamily("swarmd_peers", "Peers with an open stream", rpc.num_peers)
    yield _counter("swarmd_errors", "Requests refused or failed, by what the peer was told", "code", rpc.errors)
    moves = {"done": statistics.moves.num_moves, "failed": statistics.moves.num_failed_moves}
    yield _counter("swarmd_moves", "Moves to other blocks", "result", moves)
    yield CounterMetricFamily("swarmd_sent_bytes", "Sent to peers", statistics.traffic.sent_bytes)
    yield CounterMetricFamily("swarmd_received_bytes", "Received from peers", statistics.traffic.received_bytes)
    served = GaugeMetricFamily(
        "swarmd_peer_served_seconds", "Device time lately, of the peers that use most", labels=["peer_id"]
    )
    for use in statistics.top_peers:
        served.add_metric([use.peer_id], use.served_s)
    yield served


def _of_engine(engine: EngineStatistics) -> Iterable[Metric]:
    dispatcher, memory = engine.dispatcher, engine.memory
    yield GaugeMetricFamily("swarmd_waiting_requests", "Requests that wait for the device", dispatcher.num_waiting)
    yield GaugeMetricFamily(
        "swarmd_decoding_sessions", "Sessions with a decode step within the last second", dispatcher.num_decoding
    )
    yield GaugeMetricFamily(
        "swarmd_queue_delay_seconds", "How long a decode step waits these days", dispatcher.queue_delay_s
    )
    yield _counter("swarmd_tokens", "Tokens computed", "kind", dispatcher.num_tokens)
    yield _counter("swarmd_device_busy_seconds", "Time the device was at work", "kind", dispatcher.busy_s)
    yield _batch_rows(dispatcher.batch_sizes)
    yield GaugeMetricFamily("swarmd_kv_used_tokens", "KV cache promised or held", memory.tokens_used)
    yield GaugeMetricFamily("swarmd_kv_capacity_tokens", "KV cache in all", memory.total_tokens)
    yield GaugeMetricFamily("swarmd_kv_waiting_sessions", "Sessions that wait for KV cache", memory.num_queued)
    yield CounterMetricFamily("swarmd_kv_evictions", "Sessions that had to leave a full KV cache", memory.num_evicted)
    tunings = engine.tunings
    yield GaugeMetricFamily("swarmd_tunings", "Calls and sessions that brought a tuning along", tunings.num_held)
    yield GaugeMetricFamily("swarmd_tuning_used_bytes", "Memory of these tunings", tunings.used_bytes)
    yield GaugeMetricFamily("swarmd_tuning_capacity_bytes", "Memory for tunings in all", tunings.total_bytes)


def _counter(name: str, what: str, label: str, counts: Mapping[Key, float]) -> Metric:
    family = CounterMetricFamily(name, what, labels=[label])
    for key, count in counts.items():
        family.add_metric([str(getattr(key, "value", key))], count)
    return family


def _batch_rows(batch_sizes: Mapping[int, int]) -> Metric:
    buckets = [
        (f"{bound}.0", sum(times for rows, times in batch_sizes.items() if rows <= bound)) for bound in BATCH_BUCKETS
    ]
    buckets.append(("+Inf", sum(batch_sizes.values())))
    num_rows = sum(rows * times for rows, times in batch_sizes.items())
    return HistogramMetricFamily(
        "swarmd_decode_batch_rows", "Rows decoded together", buckets=buckets, sum_value=num_rows
    )
