"""The page on security states the limits that are in the code."""

import re
from pathlib import Path

import pytest

from p2pswarm.dht.config import DhtConfig, StoreLimits
from p2pswarm.net import admission, connection_table, listening, mux_connection
from p2pswarm.net.config import KIB, MIB, NetworkConfig
from p2pswarm.net.nat.relay import LANES_TIMEOUT_S
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.wire.framed_stream import SLOWEST_BYTES_PER_S
from p2pswarm.wire.frames import DEFAULT_LIMITS
from swarmd import memory

PAGE = re.sub(r"\s+", " ", (Path(__file__).parents[2] / "docs" / "security.md").read_text())
NET, RPC, DHT, STORE = NetworkConfig(), RpcLimits(), DhtConfig(), StoreLimits()


@pytest.mark.parametrize(
    "statement",
    [
        f"| connections taken from the system | {NET.max_accepts_per_s:g} a second, 160 at once |",
        f"| {NET.handshake_share:.0%} of".replace("%", " %"),
        f"{NET.handshake_burst_s:g} s of it saved up",
        f"good once and for {LANES_TIMEOUT_S:g} s",
        f"| first bytes of a connection | within {NET.first_bytes_timeout_s:g} s |",
        f"| whole handshake, waiting included | within {NET.dial_timeout_s:g} s |",
        f"in a handshake | {NET.max_entrants};",
        f"| {admission.TOLERATED_FAILURES} a minute, then it is refused for {admission.FIRST_BAR_S:g} s, "
        f"doubling to {admission.LONGEST_BAR_S / 60:g} min,",
        f"| connections | {NET.max_connections:,};",
        f"| connections of one peer | {NET.max_connections_per_peer} |",
        f"has open | {NET.max_streams_per_connection:,}, and {NET.max_unaccepted_streams:,} not taken up yet |",
        f"| new streams | {NET.max_new_streams_per_s:g} a second, a thousand at once;",
        f"| {NET.max_receive_bytes_per_connection // MIB} MiB of a connection, "
        f"{NET.max_receive_bytes // MIB} MiB in all |",
        f"| {mux_connection.MAX_QUEUED_BYTES // KIB} KiB of data, "
        f"{mux_connection.MAX_QUEUED_ANSWER_BYTES // KIB} KiB of answers",
        f"| is dropped after {NET.ping_interval_s + NET.ping_timeout_s:g} s |",
        f"the peer is refused for {connection_table.FIRST_BAR_S:g} s, doubling to an hour |",
        f"| {connection_table.TOLERATED_OFFENCES} a minute, then the same |",
        f"| streams with calls or sessions | {RPC.max_streams:,}, of one peer {RPC.max_streams_per_peer} |",
        f"| sessions of one peer | {RPC.max_sessions_per_peer} |",
        f"| {RPC.max_received_bytes >> 30} GiB, of one peer {RPC.max_received_bytes_per_peer >> 20} MiB |",
        f"| a frame | {DEFAULT_LIMITS.max_frame_bytes // MIB} MiB, "
        f"no slower than {SLOWEST_BYTES_PER_S // KIB} KiB a second |",
        f"the next one | within {RPC.first_message_timeout_s:g} s, {RPC.idle_stream_timeout_s:g} s |",
        f"the next one | within {RPC.first_step_timeout_s:g} s, {RPC.idle_session_timeout_s:g} s |",
        f"| taken by the client within {RPC.send_timeout_s:g} s |",
        f"| speed tests | {RPC.max_speed_test_bytes // MIB} MiB a minute, "
        f"of one peer {RPC.max_speed_test_bytes_per_peer // MIB} MiB |",
        f"| sessions that wait for room | {memory.MAX_QUEUE} |",
        f"| streams | {DHT.max_incoming_streams:,}, of one peer {DHT.max_incoming_streams_per_peer} |",
        f"| {DHT.requests_per_s_per_peer:g} a second of a peer, {DHT.request_burst_per_peer} at once, "
        f"{DHT.requests_per_s:,.0f} a second of all;",
        f"| {STORE.max_records:,} and {STORE.max_bytes // MIB} MiB; of one owner {STORE.max_records_per_owner} and "
        f"{STORE.max_bytes_per_owner // KIB} KiB; under one key {STORE.max_records_per_key:,} |",
    ],
)
def test_limits_are_the_codes(statement: str) -> None:
    assert statement in PAGE


def test_shares_and_periods_are_the_codes() -> None:
    assert (memory.MAX_SHARE, memory.MAX_EQUAL_PARTS) == (1 / 2, 2)
    assert connection_table.LONGEST_BAR_S == 3600
    assert admission.FAILURE_PERIOD_S == connection_table.OFFENCES_PERIOD_S == 60
    assert NET.max_accepts_per_s * listening.ACCEPTS_BURST_S == 160
    assert NET.max_new_streams_per_s * connection_table.NEW_STREAMS_BURST_S == 1000
