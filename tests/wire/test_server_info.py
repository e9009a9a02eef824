"""Announcements as bytes: each survives the trip; a stranger's is believed in no field."""

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError, MalformedMessage
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.testing.message_strategies import server_infos
from p2pswarm.wire.server_info import decode_server_info, encode_server_info, server_info_values

PEER = PeerId("12D3KooWpeer")
INFO = ServerInfo(
    PEER,
    ModelId("m@0123"),
    Span(0, 10),
    ServerState.ONLINE,
    ("/ip4/1.2.3.4/tcp/5",),
    30,
    10.0,
    20.0,
    30.0,
    40.0,
    "float32",
)


@given(server_infos())
@settings(deadline=None)
def test_every_announcement_survives_the_trip(info: ServerInfo) -> None:
    assert decode_server_info(encode_server_info(info)) == info


def test_unknown_fields_are_passed_over_and_missing_ones_have_their_defaults() -> None:
    values = {**server_info_values(INFO), "colour": "red"}
    for name in (
        "quantization",
        "cache_tokens_left",
        "adapters",
        "next_rtts_s",
        "queue_delay_s",
        "public_name",
        "version",
        "using_relay",
        "next_span",
        "is_pinned",
        "reachability",
    ):
        del values[name]
    assert decode_server_info(msgpack.packb(values)) == INFO


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"peer_id": ""}, "peer_id to be 1 to 256 printable"),
        ({"peer_id": "two words"}, "peer_id"),
        ({"model_id": b"m"}, "model_id"),
        ({"span": [10, 0]}, "START < END"),
        ({"span": [0, 31]}, "a span within the model's 30 blocks, got 0:31"),
        ({"next_span": [25, 31]}, "a span within the model's 30 blocks, got 25:31"),
        ({"next_span": [3, 3]}, "START < END"),
        ({"is_pinned": "no"}, "is_pinned to be true or false"),
        ({"span": [0]}, r"a block range \[start, end\]"),
        ({"state": "happy"}, "state to be one of joining, online, draining, offline"),
        ({"addresses": ["/ip4/1.2.3.4/tcp/5"] * 33}, "at most 32 texts"),
        ({"addresses": ["x" * 257]}, "at most 256 characters"),
        ({"num_model_blocks": 0}, "num_model_blocks"),
        ({"throughput_tokens_per_s": float("nan")}, "throughput_tokens_per_s to be a finite number"),
        ({"network_tokens_per_s": float("inf")}, "network_tokens_per_s"),
        ({"forward_tokens_per_s": -1.0}, "forward_tokens_per_s"),
        ({"inference_tokens_per_s": "fast"}, "inference_tokens_per_s"),
        ({"cache_tokens_left": -1}, "cache_tokens_left"),
        ({"using_relay": 1}, "using_relay to be true or false"),
        ({"reachability": "maybe"}, "reachability to be one of public, private, unknown, got 'maybe'"),
        ({"next_rtts_s": {"a": -1.0}}, "next_rtts_s from 12D3KooWpeer: wanted a to be a finite number"),
        ({"queue_delay_s": -1.0}, "queue_delay_s to be a finite number"),
        ({"next_rtts_s": {str(index): 1.0 for index in range(65)}}, "at most 64 entries"),
        ({"public_name": "\x1b[31mred"}, "printable"),
        ({"quantization": "\x1b[31mred"}, "quantization to be printable"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(MalformedMessage, match=complaint) as caught:
        decode_server_info(msgpack.packb({**server_info_values(INFO), **fields}), PEER)
    assert caught.value.peer_id == PEER


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_server_info(data, PEER)


def test_what_no_reader_would_take_is_not_announced() -> None:
    with pytest.raises(ConfigError, match="others will take"):
        encode_server_info(ServerInfo(**{**fields_of(INFO), "public_name": "two\nlines"}))


def fields_of(info: ServerInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__slots__}
