"""How busy servers are, as `swarm status --details` tells it."""

import io
import json
from dataclasses import replace

from rich.console import Console

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.server_load import ServerLoad
from p2pswarm.core.span import Span
from swarm_cli.announced import AnnouncedModel
from swarm_cli.loads import load_in_words, load_table, uptime_in_words
from swarm_cli.status import as_json

LOAD = ServerLoad(
    uptime_s=7322.0,
    num_sessions=4,
    num_waiting=1,
    mean_batch_rows=3.25,
    cache_tokens_used=512,
    cache_tokens_total=2048,
    num_evicted=0,
    decode_tokens_per_s=85.12,
    prefill_tokens_per_s=120.0,
    forward_tokens_per_s=0.0,
    sent_bytes=3 << 20,
    received_bytes=1 << 20,
    num_errors=2,
    num_moves=1,
)


def server(name: str) -> ServerInfo:
    return ServerInfo(
        PeerId(f"12D3{name}"), ModelId("m@0"), Span(0, 8), ServerState.ONLINE, (), 8, 1, 2, 3, 4, "float32"
    )


MODEL = AnnouncedModel(ModelId("m@0"), 8, (replace(server("a"), public_name="anna"), server("b")))


def test_load_is_told_in_a_line() -> None:
    assert load_in_words(LOAD) == (
        "2 h 2 min",
        "4",
        "1",
        "3.2",
        "85.1 + 120.0 + 0.0",
        "25%",
        "1.0 MiB / 3.0 MiB",
        "2",
    )
    assert load_in_words(replace(LOAD, cache_tokens_total=0))[5] == ""


def test_uptime_has_two_units_at_most() -> None:
    assert [uptime_in_words(seconds) for seconds in (0.4, 59, 61, 3600, 90061)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h",
        "1 d 1 h",
    ]


def test_servers_that_do_not_answer_are_named_as_such() -> None:
    stream = io.StringIO()
    Console(file=stream, width=140).print(load_table(MODEL, {PeerId("12D3a"): LOAD}))
    header, anna, other = stream.getvalue().splitlines()
    assert header.split()[:3] == ["server", "up", "sessions"]
    assert anna.startswith("anna ")
    assert "85.1 + 120.0 + 0.0" in anna
    assert other.split()[-2:] == ["no", "answer"]


def test_json_has_the_load_only_where_it_was_asked_for() -> None:
    assert all("load" not in entry for entry in as_json(MODEL)["servers"])
    printed = json.loads(json.dumps(as_json(MODEL, {PeerId("12D3a"): LOAD})))["servers"]
    assert printed[0]["load"]["decode_tokens_per_s"] == 85.12
    assert printed[1]["load"] is None
