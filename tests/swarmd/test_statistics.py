"""A server's statistics: one picture, the same for events, clients who ask, and Prometheus."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.net.traffic import Traffic
from p2pswarm.rpc.server import RpcStatistics
from p2pswarm.wire.messages import ErrorCode
from swarmd.config import ServerConfig, read_config
from swarmd.engine_statistics import EngineStatistics, MemoryStatistics, TuningStatistics
from swarmd.events import JsonEvents, PlainEvents
from swarmd.http_address import HttpAddress
from swarmd.metrics import metrics_page
from swarmd.monitor import Monitor
from swarmd.scheduling.dispatcher import DispatcherStatistics
from swarmd.scheduling.work import Kind
from swarmd.span_life import MoveStatistics
from swarmd.statistics import MAX_TOP_PEERS, WINDOW_S, PeerUse, RecentTokens, ServerStatistics

ANNA, BOB = PeerId("12D3anna"), PeerId("12D3bob")
INFO = ServerInfo(
    PeerId("12D3me"), ModelId("m@0"), Span(0, 4), ServerState.ONLINE, (), 8, 1.0, 2.0, 3.0, 4.0, "float32", version="1"
)
ENGINE = EngineStatistics(
    DispatcherStatistics(
        num_waiting=3,
        num_decoding=2,
        queue_delay_s=0.0125,
        num_parts={Kind.DECODE: 10, Kind.PREFILL: 2},
        num_tokens={Kind.DECODE: 40, Kind.PREFILL: 600},
        busy_s={Kind.DECODE: 1.5, Kind.PREFILL: 2.0, Kind.FORWARD: 0.0},
        batch_sizes={1: 2, 4: 7, 10: 1},
        served_s={ANNA: 0.5, BOB: 2.5},
    ),
    MemoryStatistics(total_tokens=1024, tokens_left=896, num_queued=1, num_evicted=2),
    TuningStatistics(num_held=3, used_bytes=4096, total_bytes=1 << 20),
)
RPC = RpcStatistics(
    num_peers=2,
    num_streams=5,
    num_sessions=4,
    num_busy=1,
    received_bytes=100,
    num_pushes_waiting=0,
    num_streams_served=9,
    num_streams_refused=1,
    sessions_by_peer={ANNA: 3, BOB: 1},
    errors={ErrorCode.BUSY: 5, ErrorCode.BAD_REQUEST: 1},
)
STATISTICS = ServerStatistics(
    uptime_s=60.0,
    info=INFO,
    rpc=RPC,
    moves=MoveStatistics(1, 0),
    traffic=Traffic(sent_bytes=3 << 20, received_bytes=1 << 10),
    engine=ENGINE,
    tokens_per_s={Kind.DECODE: 12.5, Kind.PREFILL: 100.0, Kind.FORWARD: 0.0},
)
GOLDEN_PAGE = """\
# HELP swarmd_info What the server announces
# TYPE swarmd_info gauge
swarmd_info{blocks="0:4",model_id="m@0",state="online",version="1"} 1.0
# HELP swarmd_uptime_seconds Since the server began
# TYPE swarmd_uptime_seconds gauge
swarmd_uptime_seconds 60.0
# HELP swarmd_sessions Open sessions
# TYPE swarmd_sessions gauge
swarmd_sessions 4.0
# HELP swarmd_peers Peers with an open stream
# TYPE swarmd_peers gauge
swarmd_peers 2.0
# HELP swarmd_errors_total Requests refused or failed, by what the peer was told
# TYPE swarmd_errors_total counter
swarmd_errors_total{code="busy"} 5.0
swarmd_errors_total{code="bad_request"} 1.0
# HELP swarmd_moves_total Moves to other blocks
# TYPE swarmd_moves_total counter
swarmd_moves_total{result="done"} 1.0
swarmd_moves_total{result="failed"} 0.0
# HELP swarmd_sent_bytes_total Sent to peers
# TYPE swarmd_sent_bytes_total counter
swarmd_sent_bytes_total 3.145728e+06
# HELP swarmd_received_bytes_total Received from peers
# TYPE swarmd_received_bytes_total counter
swarmd_received_bytes_total 1024.0
# HELP swarmd_peer_served_seconds Device time lately, of the peers that use most
# TYPE swarmd_peer_served_seconds gauge
swarmd_peer_served_seconds{peer_id="12D3bob"} 2.5
swarmd_peer_served_seconds{peer_id="12D3anna"} 0.5
# HELP swarmd_waiting_requests Requests that wait for the device
# TYPE swarmd_waiting_requests gauge
swarmd_waiting_requests 3.0
# HELP swarmd_decoding_sessions Sessions with a decode step within the last second
# TYPE swarmd_decoding_sessions gauge
swarmd_decoding_sessions 2.0
# HELP swarmd_queue_delay_seconds How long a decode step waits these days
# TYPE swarmd_queue_delay_seconds gauge
swarmd_queue_delay_seconds 0.0125
# HELP swarmd_tokens_total Tokens computed
# TYPE swarmd_tokens_total counter
swarmd_tokens_total{kind="decode"} 40.0
swarmd_tokens_total{kind="prefill"} 600.0
# HELP swarmd_device_busy_seconds_total Time the device was at work
# TYPE swarmd_device_busy_seconds_total counter
swarmd_device_busy_seconds_total{kind="decode"} 1.5
swarmd_device_busy_seconds_total{kind="prefill"} 2.0
swarmd_device_busy_seconds_total{kind="forward"} 0.0
# HELP swarmd_decode_batch_rows Rows decoded together
# TYPE swarmd_decode_batch_rows histogram
swarmd_decode_batch_rows_bucket{le="1.0"} 2.0
swarmd_decode_batch_rows_bucket{le="2.0"} 2.0
swarmd_decode_batch_rows_bucket{le="4.0"} 9.0
swarmd_decode_batch_rows_bucket{le="8.0"} 9.0
swarmd_decode_batch_rows_bucket{le="16.0"} 10.0
swarmd_decode_batch_rows_bucket{le="32.0"} 10.0
swarmd_decode_batch_rows_bucket{le="64.0"} 10.0
swarmd_decode_batch_rows_bucket{le="+Inf"} 10.0
swarmd_decode_batch_rows_count 10.0
swarmd_decode_batch_rows_sum 40.0
# HELP swarmd_kv_used_tokens KV cache promised or held
# TYPE swarmd_kv_used_tokens gauge
swarmd_kv_used_tokens 128.0
# HELP swarmd_kv_capacity_tokens KV cache in all
# TYPE swarmd_kv_capacity_tokens gauge
swarmd_kv_capacity_tokens 1024.0
# HELP swarmd_kv_waiting_sessions Sessions that wait for KV cache
# TYPE swarmd_kv_waiting_sessions gauge
swarmd_kv_waiting_sessions 1.0
# HELP swarmd_kv_evictions_total Sessions that had to leave a full KV cache
# TYPE swarmd_kv_evictions_total counter
swarmd_kv_evictions_total 2.0
# HELP swarmd_tunings Calls and sessions that brought a tuning along
# TYPE swarmd_tunings gauge
swarmd_tunings 3.0
# HELP swarmd_tuning_used_bytes Memory of these tunings
# TYPE swarmd_tuning_used_bytes gauge
swarmd_tuning_used_bytes 4096.0
# HELP swarmd_tuning_capacity_bytes Memory for tunings in all
# TYPE swarmd_tuning_capacity_bytes gauge
swarmd_tuning_capacity_bytes 1.048576e+06
"""


class StoppedClock:
    def unix_time_s(self) -> float:
        return 1700000000.0


def test_page_for_prometheus_is_this_one() -> None:
    assert metrics_page(lambda: STATISTICS)().decode() == GOLDEN_PAGE


def test_page_of_a_server_without_blocks_leaves_their_figures_out() -> None:
    page = metrics_page(lambda: replace(STATISTICS, engine=None))().decode()
    assert "swarmd_sessions 4.0" in page
    assert "swarmd_tokens" not in page


def test_page_is_made_anew_for_each_request() -> None:
    uptimes_s = iter([1.0, 2.0])
    make_page = metrics_page(lambda: replace(STATISTICS, uptime_s=next(uptimes_s)))
    assert b"swarmd_uptime_seconds 1.0" in make_page()
    assert b"swarmd_uptime_seconds 2.0" in make_page()


def test_peers_are_in_the_order_of_what_they_use() -> None:
    assert STATISTICS.top_peers == (PeerUse(BOB, 1, 2.5), PeerUse(ANNA, 3, 0.5))


def test_only_the_first_few_peers_are_named() -> None:
    many = {PeerId(f"12D3{index:02}"): 1 for index in range(30)}
    assert len(replace(STATISTICS, rpc=replace(RPC, sessions_by_peer=many)).top_peers) == MAX_TOP_PEERS


def test_strangers_are_told_sums_and_no_peer() -> None:
    load = STATISTICS.load()
    assert (load.num_sessions, load.num_waiting, load.mean_batch_rows) == (4, 3, 4.0)
    assert (load.cache_tokens_used, load.cache_tokens_total, load.num_evicted) == (128, 1024, 2)
    assert (load.decode_tokens_per_s, load.prefill_tokens_per_s) == (12.5, 100.0)
    assert (load.sent_bytes, load.received_bytes, load.num_errors, load.num_moves) == (3 << 20, 1 << 10, 6, 1)
    assert "12D3" not in repr(load)


def test_load_of_a_server_without_blocks_is_none() -> None:
    load = replace(STATISTICS, engine=None).load()
    assert (load.num_waiting, load.mean_batch_rows, load.cache_tokens_total) == (0, 0.0, 0)


def test_programs_get_the_statistics_as_one_json_object() -> None:
    stream = io.StringIO()
    JsonEvents(stream, StoppedClock())("statistics", **STATISTICS.as_fields())
    told = json.loads(stream.getvalue())
    assert told["errors"] == {"busy": 5, "bad_request": 1}
    assert told["num_tokens"] == {"decode": 40, "prefill": 600}
    assert told["tokens_per_s"] == {"decode": 12.5, "prefill": 100.0, "forward": 0.0}
    assert told["top_peers"][0] == {"peer_id": BOB, "num_sessions": 1, "served_s": 2.5}
    assert (told["cache_tokens_used"], told["mean_batch_rows"]) == (128, 4.0)


def test_people_get_the_statistics_in_a_line() -> None:
    stream = io.StringIO()
    events = PlainEvents(stream)
    events("statistics", **STATISTICS.as_fields())
    events("statistics", **replace(STATISTICS, engine=None).as_fields())
    first, second = stream.getvalue().splitlines()
    assert first == (
        "4 sessions of 2 peers; 3 requests waiting, 4.0 rows a batch; 128 of 1024 KV tokens used; "
        "12.5 tokens/s decoded, 100.0 of prompts, 0.0 forward; 1.0 KiB in, 3.0 MiB out; 6 errors, 1 moves"
    )
    assert "waiting" not in second


def test_tokens_per_second_are_those_of_the_last_half_minute() -> None:
    recent = RecentTokens()
    assert recent.per_s()[Kind.DECODE] == 0.0
    for second in range(0, 101, 5):
        recent.note({Kind.DECODE: 10 * second if second < 50 else 500 + 20 * (second - 50)}, float(second))
    assert recent.per_s() == dict.fromkeys(Kind, 0.0) | {Kind.DECODE: 20.0}
    recent.note({Kind.DECODE: 2500}, 100.0 + WINDOW_S)
    assert recent.per_s()[Kind.DECODE] == 1000 / WINDOW_S


def test_tokens_per_second_start_anew_with_other_blocks() -> None:
    recent = RecentTokens()
    recent.note({Kind.DECODE: 1000}, 0.0)
    recent.note({Kind.DECODE: 10}, 5.0)
    assert recent.per_s()[Kind.DECODE] == 0.0
    recent.note({Kind.DECODE: 60}, 10.0)
    assert recent.per_s()[Kind.DECODE] == 10.0


def make_monitor(current: SimpleNamespace) -> Monitor:
    presence, life = SimpleNamespace(info=INFO), SimpleNamespace(statistics=lambda: MoveStatistics(0, 0))
    return Monitor(presence, current, SimpleNamespace(statistics=lambda: RPC), life, Traffic(7, 8))


async def test_monitor_tells_once_in_a_period_and_answers_clients(autojump_clock) -> None:
    told: list[tuple[str, dict[str, object]]] = []
    current = SimpleNamespace(statistics=lambda: ENGINE, describe_load=lambda: None)
    monitor = make_monitor(current)
    async with trio.open_nursery() as nursery:
        config = ServerConfig(model="m", stats_period_s=10.0)
        await nursery.start(monitor.run, config, lambda event, **fields: told.append((event, fields)))
        await trio.sleep(35)
        assert current.describe_load().uptime_s == 35.0
        nursery.cancel_scope.cancel()
    assert [(event, fields["uptime_s"]) for event, fields in told] == [
        ("statistics", 10.0),
        ("statistics", 20.0),
        ("statistics", 30.0),
    ]
    assert told[0][1]["sent_bytes"] == 7


async def test_monitor_is_quiet_unless_it_is_asked_to_tell(autojump_clock) -> None:
    told: list[str] = []
    monitor = make_monitor(SimpleNamespace(statistics=lambda: None, describe_load=lambda: None))
    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.run, ServerConfig(model="m"), lambda event, **fields: told.append(event))
        await trio.sleep(3600)
        nursery.cancel_scope.cancel()
    assert told == []


@pytest.mark.parametrize(
    ("text", "host", "port", "url"),
    [
        ("9464", "127.0.0.1", 9464, "http://127.0.0.1:9464/metrics"),
        ("0.0.0.0:80", "0.0.0.0", 80, "http://0.0.0.0:80/metrics"),
        ("[::1]:9464", "::1", 9464, "http://[::1]:9464/metrics"),
    ],
)
def test_metrics_are_for_this_machine_unless_an_address_is_given(text: str, host: str, port: int, url: str) -> None:
    config = read_config(ServerConfig, {"model": "m", "metrics": text})
    assert config.metrics == HttpAddress(host, port)
    assert config.metrics.url(port) == url


@pytest.mark.parametrize("text", ["", "localhost:9464", "1.2.3.4:", "9464x", "70000", "-1", "1.2.3:5"])
def test_metrics_address_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        read_config(ServerConfig, {"model": "m", "metrics": text})


def test_reference_page_names_every_field_and_metric() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference-swarmd.md").read_text()
    section = page.partition("## Statistics\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    metrics = {
        line.split()[2].removeprefix("swarmd_") for line in GOLDEN_PAGE.splitlines() if line.startswith("# TYPE")
    }
    assert metrics <= named
    assert set(STATISTICS.as_fields()) <= named
