"""What `swarm route` tells: the steps of a token with their costs, and why other servers were left out."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.routing.dstar_planner import DStarLitePlanner
from p2pswarm.routing.planner import RouteRequest
from swarm_cli.announced import AnnouncedModel
from swarm_cli.paths import FoundPath
from swarm_cli.route import ExplainedRoute, as_json, print_route, the_one

MODEL = ModelId("tiny@0123456789abcdef")


def server(name: str, span: str, state: ServerState = ServerState.ONLINE, **figures: object) -> ServerInfo:
    info: dict[str, object] = {"cache_tokens_left": 1000, **figures}
    return ServerInfo(
        PeerId(f"12D3{name}"),
        MODEL,
        Span.parse(span),
        state,
        (),
        6,
        100.0,
        100.0,
        100.0,
        100.0,
        "float32",
        public_name=name,
        **info,  # type: ignore[arg-type]
    )


@pytest.fixture
def told() -> ExplainedRoute:
    servers = [
        server("anna", "0:2", next_rtts_s={PeerId("12D3bob"): 0.004}),
        server("bob", "2:4", queue_delay_s=0.006),
        server("carl", "4:6"),
        server("dora", "4:6", ServerState.DRAINING),
        server("emil", "4:6"),
    ]
    round_trips_s = {info.peer_id: 0.02 for info in servers[:4]} | {PeerId("12D3emil"): 0.09}
    planner = DStarLitePlanner()
    planner.update(servers, round_trips_s)
    explanation = planner.explain(RouteRequest(Span(0, 6), max_length=10), 0.0)
    paths = {
        PeerId("12D3anna"): FoundPath(None),
        PeerId("12D3bob"): FoundPath(PeerId("12D3KooWrelay1")),
        PeerId("12D3carl"): FoundPath(PeerId("12D3KooWrelay1"), direct_after_s=0.42),
    }
    return ExplainedRoute(MODEL, {info.peer_id: info for info in servers}, round_trips_s, explanation, paths)


def test_people_read_each_step_its_cost_and_who_was_left_out(told: ExplainedRoute) -> None:
    output = io.StringIO()
    print_route(Console(file=output, width=200, highlight=False), told)
    lines = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    assert lines == [
        "tiny@0123456789abcdef: 114.0 ms a token",
        "route 0:2 anna → 2:4 bob → 4:6 carl",
        "path anna: directly",
        "path bob: through relay …relay1",
        "path carl: through relay …relay1, then directly after 0.4 s",
        "ms made of",
        "client to anna 12.0 network 10.0, overhead 2.0",
        "anna runs 0:2 20.0 compute 20.0",
        "anna pushes to bob 10.0 network 2.0, overhead 2.0, queue 6.0",
        "bob runs 2:4 20.0 compute 20.0",
        "bob to client 10.0 network 10.0",
        "client to carl 12.0 network 10.0, overhead 2.0",
        "carl runs 4:6 20.0 compute 20.0",
        "carl to client 10.0 network 10.0",
        "left out 4:6 emil: a route through it takes 70.0 ms more",
        "left out 4:6 dora: draining",
    ]


def test_programs_read_parts_that_add_up(told: ExplainedRoute) -> None:
    printed = json.loads(json.dumps(as_json(told)))
    assert printed["model_id"] == MODEL
    assert [(hop["name"], hop["start"], hop["end"]) for hop in printed["route"]] == [
        ("anna", 0, 2),
        ("bob", 2, 4),
        ("carl", 4, 6),
    ]
    assert [(path["relay"], path["direct_after_s"]) for path in printed["paths"]] == [
        (None, None),
        ("12D3KooWrelay1", None),
        ("12D3KooWrelay1", 0.42),
    ]
    assert sum(edge["cost_us"] for edge in printed["edges"]) == printed["cost_us"] == 114_000
    assert all(sum(edge["parts_us"].values()) == edge["cost_us"] for edge in printed["edges"])
    assert printed["edges"][2] == {
        "kind": "push",
        "from": "12D3anna",
        "to": "12D3bob",
        "start": None,
        "end": None,
        "cost_us": 10_000,
        "parts_us": {"network": 2000, "overhead": 2000, "queue": 6000},
    }
    assert [(one["name"], one["extra_us"]) for one in printed["turned_down"]] == [("emil", 70_000), ("dora", None)]
    assert printed["round_trips_s"]["12D3emil"] == 0.09


def test_a_name_that_two_models_have_is_not_guessed() -> None:
    models = [AnnouncedModel(ModelId(f"tiny@{number}"), 6, ()) for number in range(2)]
    assert the_one(models[:1], "tiny") is models[0]
    with pytest.raises(ConfigError, match="tiny may be any of tiny@0, tiny@1: give the whole id"):
        the_one(models, "tiny")


def test_looking_round_needs_no_torch() -> None:
    code = "import sys, swarm_cli.route, swarm_cli.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
