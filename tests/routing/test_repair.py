"""After a failure the cheapest thing is done: the lost blocks alone are replaced, or the rest is routed anew."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_worlds import NUM_BLOCKS, decode_us, edges_of_spans, every_route, names, near, server, worlds

from p2pswarm.core.errors import ConfigError, MissingBlocksError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import BanReason
from p2pswarm.routing.costs import CostModel
from p2pswarm.routing.planner import RepairRequest, RouteRequest
from p2pswarm.routing.prices import DecodePrices, RebuildPrices
from p2pswarm.routing.route import Hop, Route
from p2pswarm.routing.shortest_path import ShortestPathPlanner


def hop(name: str, start: int, end: int) -> Hop:
    return Hop(PeerId(name), Span(start, end))


def repaired(
    servers: Sequence[ServerInfo], rtts: Mapping[PeerId, float], request: RepairRequest, banned: str = ""
) -> Route:
    planner = ShortestPathPlanner()
    planner.update(servers, rtts)
    if banned:
        planner.ban(PeerId(banned), 0.0, BanReason.UNREACHABLE)
    return planner.repair(request, now_s=0.0)


def lost(start: int, end: int, *kept: Hop, position: int = 100, remaining_tokens: int = 100) -> RepairRequest:
    return RepairRequest(RouteRequest(Span(start, end)), kept, position, remaining_tokens)


def test_lost_blocks_are_replaced_by_two_servers_and_the_kept_hop_stays_as_it_is() -> None:
    servers = [server("dead", 2, 4), server("b", 1, 3), server("c", 3, 4), server("kept", 0, 6)]
    kept = hop("kept", 4, 6)
    route = repaired(servers, near("b", "c", "kept"), lost(2, 4, kept), banned="dead")
    assert names(route) == [("kept", "2:4"), ("kept", "4:6")]
    servers[-1] = server("kept", 4, 6)
    route = repaired(servers, near("b", "c", "kept"), lost(2, 4, kept), banned="dead")
    assert names(route) == [("b", "2:3"), ("c", "3:4"), ("kept", "4:6")]
    assert route.hops[-1] is kept


def test_faster_suffix_is_worth_its_rebuilding_only_for_long_sessions() -> None:
    servers = [server("stand-in", 2, 4), server("kept", 4, 6, rate=10), server("fast", 2, 6, rate=1000)]
    rtts = near("stand-in", "kept", "fast")
    few = lost(2, 4, hop("kept", 4, 6), position=10_000, remaining_tokens=1)
    many = lost(2, 4, hop("kept", 4, 6), position=10_000, remaining_tokens=10_000)
    assert names(repaired(servers[:2], rtts, many)) == [("stand-in", "2:4"), ("kept", "4:6")]
    assert names(repaired(servers, rtts, few)) == [("fast", "2:4"), ("kept", "4:6")]
    assert names(repaired(servers, rtts, many)) == [("fast", "2:6")]


def test_kept_hop_that_is_no_longer_announced_stays_in_use() -> None:
    servers = [server("a", 0, 4), server("b", 0, 6, rate=900)]
    kept = hop("vanished", 4, 6)
    assert repaired(servers, {}, lost(0, 4, kept)).hops[-1] is kept


def test_full_server_may_go_on_with_what_it_holds() -> None:
    servers = [server("a", 0, 3), server("kept", 3, 6, room=0), server("other", 3, 6, rate=900)]
    request = RepairRequest(RouteRequest(Span(0, 3), max_length=10), (hop("kept", 3, 6),), 1000, 10)
    route = repaired(servers, near("a", "kept", "other"), request)
    assert names(route) == [("a", "0:3"), ("kept", "3:6")]
    assert route.cost_us < 1_000_000


def test_blocks_that_only_a_kept_hop_holds_cannot_be_lost() -> None:
    with pytest.raises(MissingBlocksError, match="no server for blocks 2:3 of 0:3"):
        repaired([server("a", 0, 2), server("kept", 3, 6)], {}, lost(0, 3, hop("kept", 3, 6)))


def test_kept_hops_must_follow_the_lost_blocks() -> None:
    with pytest.raises(ConfigError, match="go on at block 3"):
        lost(0, 3, hop("kept", 4, 6))


def every_repair(servers: Sequence[ServerInfo], request: RepairRequest) -> list[tuple[Hop, ...]]:
    """All ways to finish: any of the kept hops, and new ones that change servers at boundaries."""
    start, end = request.span.start, request.span.end
    edges = edges_of_spans(servers) | {edge for one in request.kept for edge in (one.span.start, one.span.end)}

    def ways(reached: int) -> list[tuple[Hop, ...]]:
        if reached == end:
            return [()]
        found = [(one, *rest) for one in request.kept if one.span.start == reached for rest in ways(one.span.end)]
        for info in servers:
            for leave in range(reached + 1, min(info.span.end, end) + 1):
                if info.span.covers(reached) and (leave in edges or leave == end):
                    found += [(Hop(info.peer_id, Span(reached, leave)), *rest) for rest in ways(leave)]
        return found

    return ways(start)


def total_us(
    hops: Sequence[Hop], request: RepairRequest, by_id: Mapping[PeerId, ServerInfo], rtts: Mapping[PeerId, float]
) -> int:
    """Decoding the tokens to come, and bringing the new servers up to the position."""
    prices = RebuildPrices(DecodePrices(CostModel(), rtts, 0), request.position, request.remaining_tokens)
    rebuild_us = sum(
        prices.rebuild_us(by_id[one.peer_id])
        + one.span.num_blocks * CostModel().prefill_block_us(by_id[one.peer_id], request.position)
        for one in hops
        if one not in request.kept
    )
    return decode_us(hops, by_id, rtts, kept=request.kept) * request.remaining_tokens + rebuild_us


@settings(deadline=None)
@given(worlds(), st.data())
def test_repair_is_as_cheap_as_the_best_of_all_repairs(
    world: tuple[list[ServerInfo], dict[PeerId, float]], data: st.DataObject
) -> None:
    servers, rtts = world
    by_id = {one.peer_id: one for one in servers}
    whole = [
        hops for hops in every_route(servers, 0, NUM_BLOCKS) if all(a.peer_id != b.peer_id for a, b in pairwise(hops))
    ]
    if not whole:
        return
    hops = data.draw(st.sampled_from(whole))
    first, last = sorted(data.draw(st.tuples(st.integers(0, len(hops) - 1), st.integers(0, len(hops) - 1))))
    span = Span(hops[first].span.start, hops[last].span.end)
    position, remaining_tokens = data.draw(st.tuples(st.sampled_from([0, 100]), st.sampled_from([1, 500])))
    request = RepairRequest(RouteRequest(span), hops[last + 1 :], position, remaining_tokens)
    route = repaired(servers, rtts, request)
    best_us = min(total_us(one, request, by_id, rtts) for one in every_repair(servers, request))
    assert route.span == request.span
    assert total_us(route.hops, request, by_id, rtts) == best_us
    assert route.cost_us == decode_us(route.hops, by_id, rtts, kept=request.kept)
