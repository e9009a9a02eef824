"""For throughput every server is used, as much as it declares to carry."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from routing_worlds import NUM_BLOCKS, names, server

from p2pswarm.core.errors import MissingBlocksError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.routing.dstar_planner import DStarLitePlanner
from p2pswarm.routing.planner import RouteMode, RouteRequest

PARALLEL = RouteRequest(Span(0, NUM_BLOCKS), mode=RouteMode.MAX_THROUGHPUT)


def planner(*servers: ServerInfo, seed: int = 1) -> DStarLitePlanner:
    made = DStarLitePlanner(random=random.Random(seed))
    made.update(servers, {})
    return made


def test_calls_are_shared_out_by_declared_throughput() -> None:
    made = planner(server("small", 0, 6, rate=10), server("large", 0, 6, rate=30))
    chosen = Counter(made.plan(PARALLEL, 0.0).hops[0].peer_id for _ in range(1000))
    assert 700 <= chosen[PeerId("large")] <= 800


def test_routes_go_on_where_another_server_begins_in_the_middle() -> None:
    made = planner(server("a", 0, 4), server("b", 2, 6))
    assert names(made.plan(PARALLEL, 0.0)) == [("a", "0:4"), ("b", "4:6")]
    assert names(made.plan(replace(PARALLEL, span=Span(1, 5)), 0.0)) == [("a", "1:4"), ("b", "4:5")]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_server_without_a_sound_figure_is_the_last_resort(rate: float) -> None:
    made = planner(server("odd", 0, 6, rate=rate), server("sound", 0, 6))
    assert {made.plan(PARALLEL, 0.0).hops[0].peer_id for _ in range(100)} == {"sound"}
    assert names(planner(server("odd", 0, 6, rate=rate)).plan(PARALLEL, 0.0)) == [("odd", "0:6")]


def test_avoided_servers_and_missing_blocks_are_as_in_any_route() -> None:
    made = planner(server("a", 0, 6), server("b", 0, 3))
    with pytest.raises(MissingBlocksError, match="no server for blocks 3:6"):
        made.plan(replace(PARALLEL, avoided=frozenset({PeerId("a")})), 0.0)


def test_same_seed_gives_the_same_routes() -> None:
    def routes() -> list[object]:
        made = planner(*(server(f"s{i}", 0, 6) for i in range(5)), seed=7)
        return [made.plan(PARALLEL, 0.0) for _ in range(20)]

    assert routes() == routes()
