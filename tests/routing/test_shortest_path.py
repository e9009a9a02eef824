"""Routes are the cheapest there are, never use what may not be used, and say what is missing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_worlds import NUM_BLOCKS, decode_us, edges_of_spans, every_route, names, near, server, spans, worlds

from p2pswarm.core.errors import MissingBlocksError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import BanReason
from p2pswarm.routing.planner import RouteRequest, ServerFilter
from p2pswarm.routing.route import Hop, Route
from p2pswarm.routing.shortest_path import ShortestPathPlanner

WHOLE = RouteRequest(Span(0, NUM_BLOCKS))


def planned(
    servers: Sequence[ServerInfo],
    round_trips_s: Mapping[PeerId, float] | None = None,
    request: RouteRequest = WHOLE,
    only: ServerFilter | None = None,
) -> Route:
    planner = ShortestPathPlanner(servers=only)
    planner.update(servers, round_trips_s or {})
    return planner.plan(request, now_s=0.0)


@settings(deadline=None)
@given(worlds(), spans, st.sampled_from([0, 50]), st.booleans())
def test_route_costs_what_the_best_of_all_routes_costs(
    world: tuple[list[ServerInfo], dict[PeerId, float]], wanted: tuple[int, int], max_length: int, pushes: bool
) -> None:
    servers, rtts = world
    request = RouteRequest(Span(*wanted), max_length=max_length, batch_size=2, pushes=pushes)
    by_id = {one.peer_id: one for one in servers}
    routes = every_route(servers, *wanted, edges_of_spans(servers) if pushes else range(NUM_BLOCKS))
    possible = [decode_us(hops, by_id, rtts, request.cache_tokens, pushes) for hops in routes]
    if not possible:
        with pytest.raises(MissingBlocksError):
            planned(servers, rtts, request)
        return
    route = planned(servers, rtts, request)
    assert route.span == request.span
    assert all(by_id[hop.peer_id].span.contains(hop.span) for hop in route.hops)
    assert route.cost_us == decode_us(route.hops, by_id, rtts, request.cache_tokens, pushes) == min(possible)


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


def test_near_neighbours_are_worth_a_push_and_only_where_the_request_allows_it() -> None:
    first, far = server("first", 0, 3, next_rtts_s={"beside": 0.002}), 0.1
    servers = [first, server("beside", 3, 6, rate=99), server("other", 3, 6)]
    rtts = near("first", "beside", "other", rtt_s=far)
    assert names(planned(servers, rtts)) == [("first", "0:3"), ("beside", "3:6")]
    assert names(planned(servers, rtts, replace(WHOLE, pushes=False))) == [("first", "0:3"), ("other", "3:6")]


def test_output_in_another_dtype_is_not_pushed() -> None:
    first = server("first", 0, 3, next_rtts_s={"beside": 0.002})
    servers = [first, server("beside", 3, 6, rate=99, dtype="bfloat16"), server("other", 3, 6)]
    assert names(planned(servers)) == [("first", "0:3"), ("other", "3:6")]


def test_no_server_is_only_passed_through_however_near_it_is_to_both() -> None:
    hub = server("hub", 0, 6, rate=1, next_rtts_s={"last": 0.0})
    servers = [server("first", 0, 3, next_rtts_s={"hub": 0.0}), server("last", 3, 6), hub]
    assert names(planned(servers, near("first", "last", "hub", rtt_s=0.3))) == [("first", "0:3"), ("last", "3:6")]


def test_busy_server_and_one_behind_a_relay_are_gone_round() -> None:
    assert names(planned([server("a", 0, 6, queue_delay_s=0.02), server("b", 0, 6)])) == [("b", "0:6")]
    assert names(planned([server("a", 0, 6, using_relay=True), server("b", 0, 6)])) == [("b", "0:6")]


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
    planner.ban(PeerId("a"), 1.0, BanReason.UNREACHABLE)
    assert planner.banned(15.9).keys() == {"a"}
    assert names(planner.plan(WHOLE, now_s=15.9)) == [("b", "0:6")]
    assert names(planner.plan(WHOLE, now_s=16.0)) == [("a", "0:6")]


def test_forgiven_server_is_used_at_once() -> None:
    planner = ShortestPathPlanner()
    planner.update([server("a", 0, 6), server("b", 0, 6)], {})
    planner.ban(PeerId("a"), 0.0, BanReason.MISBEHAVED)
    planner.forgive(PeerId("a"))
    assert names(planner.plan(WHOLE, now_s=0.0)) == [("a", "0:6")]


def test_server_without_room_is_avoided_for_this_request_only() -> None:
    planner = ShortestPathPlanner()
    planner.update([server("a", 0, 6), server("b", 0, 6)], {})
    assert names(planner.plan(replace(WHOLE, avoided=frozenset({PeerId("a")})), now_s=0.0)) == [("b", "0:6")]
    assert names(planner.plan(WHOLE, now_s=0.0)) == [("a", "0:6")]


def test_allowed_and_blocked_servers_are_named_by_peer_id_which_nobody_can_borrow() -> None:
    servers = [server("a", 0, 6), replace(server("b", 0, 6), public_name="a")]
    a, b = PeerId("a"), PeerId("b")
    assert names(planned(servers, only=ServerFilter(allowed=frozenset({b})))) == [("b", "0:6")]
    assert names(planned(servers, only=ServerFilter(blocked=frozenset({a})))) == [("b", "0:6")]
    with pytest.raises(MissingBlocksError, match="not among the allowed"):
        planned(servers[1:], only=ServerFilter(allowed=frozenset({a})))


def test_servers_whose_weights_are_held_in_another_way_are_not_used() -> None:
    exact = ServerFilter(quantization=frozenset({Quantization.NONE}))
    servers = [replace(server("a", 0, 6), quantization="nf4"), server("b", 0, 6)]
    assert names(planned(servers)) == [("a", "0:6")]
    assert names(planned(servers, only=exact)) == [("b", "0:6")]
    with pytest.raises(MissingBlocksError, match="its weights are held as nf4"):
        planned(servers[:1], only=exact)


def test_route_with_a_gap_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="does not start at its end"):
        Route((Hop(PeerId("a"), Span(0, 2)), Hop(PeerId("b"), Span(3, 4))))
