"""Routes are the cheapest there are, never use what may not be used, and say what is missing."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.errors import MissingBlocksError
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.routing.costs import CostModel
from p2pswarm.routing.planner import RouteRequest, ServerFilter
from p2pswarm.routing.route import Hop, Route
from p2pswarm.routing.shortest_path import ShortestPathPlanner

NUM_BLOCKS = 6
WHOLE = RouteRequest(Span(0, NUM_BLOCKS))


def server(
    name: str, start: int, end: int, rate: float = 100.0, room: int = 1 << 20, max_length: int = 0
) -> ServerInfo:
    return ServerInfo(
        peer_id=PeerId(name),
        model_id=ModelId("m@0"),
        span=Span(start, end),
        state=ServerState.ONLINE,
        addresses=(),
        num_model_blocks=NUM_BLOCKS,
        throughput_tokens_per_s=rate,
        inference_tokens_per_s=rate,
        forward_tokens_per_s=rate,
        network_tokens_per_s=rate,
        dtype="float32",
        cache_tokens_left=room,
        max_length=max_length,
    )


def planned(
    servers: Sequence[ServerInfo],
    round_trips_s: Mapping[PeerId, float] | None = None,
    request: RouteRequest = WHOLE,
    only: ServerFilter | None = None,
) -> Route:
    planner = ShortestPathPlanner(servers=only)
    planner.update(servers, round_trips_s or {})
    return planner.plan(request, now_s=0.0)


def names(route: Route) -> list[tuple[str, str]]:
    return [(hop.peer_id, str(hop.span)) for hop in route.hops]


def every_route(servers: Sequence[ServerInfo], start: int, end: int) -> Iterator[tuple[Hop, ...]]:
    if start == end:
        yield ()
        return
    for one in servers:
        for leave in range(start + 1, min(one.span.end, end) + 1):
            if one.span.covers(start):
                for rest in every_route(servers, leave, end):
                    yield (Hop(one.peer_id, Span(start, leave)), *rest)


def cost_us(
    hops: Sequence[Hop], servers: Mapping[PeerId, ServerInfo], round_trips_s: Mapping[PeerId, float], cache_tokens: int
) -> int:
    costs = CostModel()
    total = 0
    for hop in hops:
        info, round_trip_s = servers[hop.peer_id], round_trips_s.get(hop.peer_id)
        total += costs.enter_us(info, round_trip_s, cache_tokens) + costs.half_round_trip_us(round_trip_s)
        total += hop.span.num_blocks * costs.block_us(info)
    return total


spans = st.tuples(st.integers(0, NUM_BLOCKS - 1), st.integers(1, NUM_BLOCKS)).filter(lambda ends: ends[0] < ends[1])
round_trips = st.sampled_from([0.0, 0.001, 0.02, 0.02, 0.3, 9.0, math.inf, None])
servers_and_round_trips = st.lists(
    st.tuples(spans, st.sampled_from([0.0, 10.0, 50.0, 50.0, 900.0]), st.sampled_from([0, 100]), round_trips),
    min_size=1,
    max_size=6,
)


@given(servers_and_round_trips, spans, st.sampled_from([0, 50]))
def test_route_costs_what_the_best_of_all_routes_costs(
    facts: list[tuple[tuple[int, int], float, int, float | None]], wanted: tuple[int, int], max_length: int
) -> None:
    servers = [server(f"peer{i}", *span, rate=rate, room=room) for i, (span, rate, room, _) in enumerate(facts)]
    rtts = {PeerId(f"peer{i}"): rtt for i, (_, _, _, rtt) in enumerate(facts) if rtt is not None}
    request = RouteRequest(Span(*wanted), max_length=max_length, batch_size=2)
    by_id = {one.peer_id: one for one in servers}
    possible = [cost_us(hops, by_id, rtts, request.cache_tokens) for hops in every_route(servers, *wanted)]
    if not possible:
        with pytest.raises(MissingBlocksError):
            planned(servers, rtts, request)
        return
    route = planned(servers, rtts, request)
    assert route.span == request.span
    assert all(by_id[hop.peer_id].span.contains(hop.span) for hop in route.hops)
    assert route.cost_us == cost_us(route.hops, by_id, rtts, request.cache_tokens) == min(possible)


@given(st.permutations(range(5)))
def test_equal_servers_give_the_same_route_in_whatever_order_they_were_announced(order: list[int]) -> None:
    servers = [server("a", 0, 3), server("b", 0, 3), server("c", 3, 6), server("d", 3, 6), server("e", 2, 5)]
    assert names(planned([servers[i] for i in order])) == [("a", "0:3"), ("c", "3:6")]


def test_near_slow_server_is_left_early_for_a_faster_one() -> None:
    servers = [server("slow", 0, 6, rate=10), server("fast", 2, 6, rate=1000)]
    rtts = {PeerId("slow"): 0.001, PeerId("fast"): 0.001}
    assert names(planned(servers, rtts)) == [("slow", "0:2"), ("fast", "2:6")]


def test_one_server_beats_two_that_are_each_as_fast() -> None:
    servers = [server("a", 0, 3), server("b", 3, 6), server("whole", 0, 6)]
    assert names(planned(servers)) == [("whole", "0:6")]


def test_measured_near_server_beats_an_unmeasured_one() -> None:
    assert names(planned([server("a", 0, 6), server("near", 0, 6)], {PeerId("near"): 0.03})) == [("near", "0:6")]


def test_room_for_the_whole_batch_is_looked_for() -> None:
    servers = [server("near", 0, 6, room=300), server("roomy", 0, 6, room=1000)]
    rtts = {PeerId("near"): 0.001, PeerId("roomy"): 0.2}
    assert names(planned(servers, rtts, replace(WHOLE, max_length=100, batch_size=3))) == [("near", "0:6")]
    assert names(planned(servers, rtts, replace(WHOLE, max_length=100, batch_size=4))) == [("roomy", "0:6")]


def test_full_server_is_still_the_last_resort() -> None:
    route = planned([server("full", 0, 6, room=0)], request=replace(WHOLE, max_length=10))
    assert names(route) == [("full", "0:6")]


def test_missing_ranges_and_turned_down_servers_are_named() -> None:
    gone = replace(server("drainingpeer", 2, 4), state=ServerState.DRAINING)
    short = server("shortpeer", 5, 6, max_length=10)
    with pytest.raises(MissingBlocksError) as error:
        planned([server("a", 0, 2), gone, server("b", 4, 5), short], request=replace(WHOLE, max_length=11))
    assert error.value.missing == ((2, 4), (5, 6))
    assert str(error.value) == (
        "no server for blocks 2:4, 5:6 of 0:6; not usable: …ngpeer 2:4 (draining), "
        "…rtpeer 5:6 (takes at most 10 tokens, 11 are wanted)"
    )


@pytest.mark.parametrize("state", [state for state in ServerState if state is not ServerState.ONLINE])
def test_only_online_servers_are_used(state: ServerState) -> None:
    with pytest.raises(MissingBlocksError, match=state.value):
        planned([replace(server("a", 0, 6), state=state)])


def test_banned_server_comes_back_when_the_ban_ends() -> None:
    planner = ShortestPathPlanner()
    planner.update([server("a", 0, 6), server("b", 0, 6)], {})
    planner.ban(PeerId("a"), until_s=10.0)
    assert names(planner.plan(WHOLE, now_s=9.9)) == [("b", "0:6")]
    assert names(planner.plan(WHOLE, now_s=10.0)) == [("a", "0:6")]


def test_server_without_room_is_avoided_for_this_request_only() -> None:
    planner = ShortestPathPlanner()
    planner.update([server("a", 0, 6), server("b", 0, 6)], {})
    assert names(planner.plan(replace(WHOLE, avoided=frozenset({PeerId("a")})), now_s=0.0)) == [("b", "0:6")]
    assert names(planner.plan(WHOLE, now_s=0.0)) == [("a", "0:6")]


def test_shorter_ban_does_not_lift_a_longer_one() -> None:
    planner = ShortestPathPlanner()
    planner.update([server("a", 0, 6), server("b", 0, 6)], {})
    planner.ban(PeerId("a"), until_s=10.0)
    planner.ban(PeerId("a"), until_s=5.0)
    assert names(planner.plan(WHOLE, now_s=7.0)) == [("b", "0:6")]


def test_allowed_and_blocked_servers_are_named_by_peer_id_which_nobody_can_borrow() -> None:
    servers = [server("a", 0, 6), replace(server("b", 0, 6), public_name="a")]
    a, b = PeerId("a"), PeerId("b")
    assert names(planned(servers, only=ServerFilter(allowed=frozenset({b})))) == [("b", "0:6")]
    assert names(planned(servers, only=ServerFilter(blocked=frozenset({a})))) == [("b", "0:6")]
    with pytest.raises(MissingBlocksError, match="not among the allowed"):
        planned(servers[1:], only=ServerFilter(allowed=frozenset({a})))


def test_route_with_a_gap_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="does not start at its end"):
        Route((Hop(PeerId("a"), Span(0, 2)), Hop(PeerId("b"), Span(3, 4))))
