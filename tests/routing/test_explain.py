"""Explanations add up, and say for each server why it is not in the route."""

from dataclasses import replace

from hypothesis import given, settings
from routing_worlds import NUM_BLOCKS, every_route, near, server, worlds

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import BanReason
from p2pswarm.routing.dstar_planner import DStarLitePlanner
from p2pswarm.routing.explain import EdgeKind, TurnedDown
from p2pswarm.routing.planner import RouteRequest

WHOLE = RouteRequest(Span(0, NUM_BLOCKS))


def test_route_is_told_edge_by_edge_with_what_each_cost_is_made_of() -> None:
    planner = DStarLitePlanner()
    planner.update(
        [
            server("a", 0, 2, next_rtts_s={"b": 0.004}),
            server("b", 2, 4, queue_delay_s=0.006),
            server("c", 4, 6, using_relay=True, room=0),
        ],
        near("a", "b", "c", rtt_s=0.02),
    )
    told = planner.explain(replace(WHOLE, max_length=10), now_s=0.0)
    edges = [
        (edge.kind, edge.source, edge.target, edge.span, {k: v for k, v in edge.parts._asdict().items() if v})
        for edge in told.edges
    ]
    assert edges == [
        (EdgeKind.ENTER, None, "a", None, {"network_us": 10_000, "overhead_us": 2000}),
        (EdgeKind.RUN, "a", "a", Span(0, 2), {"compute_us": 20_000}),
        (EdgeKind.PUSH, "a", "b", None, {"network_us": 2000, "overhead_us": 2000, "queue_us": 6000}),
        (EdgeKind.RUN, "b", "b", Span(2, 4), {"compute_us": 20_000}),
        (EdgeKind.LEAVE, "b", None, None, {"network_us": 10_000}),
        (
            EdgeKind.ENTER,
            None,
            "c",
            None,
            {"network_us": 10_000, "overhead_us": 2000, "no_room_us": 10_000_000, "relay_us": 50_000},
        ),
        (EdgeKind.RUN, "c", "c", Span(4, 6), {"compute_us": 20_000}),
        (EdgeKind.LEAVE, "c", None, None, {"network_us": 10_000}),
    ]
    assert told.turned_down == ()


def test_every_other_server_is_named_with_the_reason_it_was_left_out() -> None:
    planner = DStarLitePlanner()
    planner.update(
        [
            server("chosen", 0, 3),
            server("far", 1, 3),
            server("last", 3, 6),
            server("same", 3, 6),
            replace(server("leaving", 0, 6), state=ServerState.DRAINING),
            server("dead", 0, 6),
        ],
        near("chosen", "last", "same") | near("far", rtt_s=0.101),
    )
    planner.ban(PeerId("dead"), 0.0, BanReason.UNREACHABLE)
    assert planner.explain(WHOLE, now_s=5.0).turned_down == (
        TurnedDown(PeerId("same"), Span(3, 6), "another is as fast", 0),
        TurnedDown(PeerId("far"), Span(1, 3), "a route through it takes 103.0 ms more", 103_000),
        TurnedDown(PeerId("dead"), Span(0, 6), "banned for 10 s more after a failure (unreachable)"),
        TurnedDown(PeerId("leaving"), Span(0, 6), "draining"),
    )
    narrow = planner.explain(replace(WHOLE, span=Span(3, 6)), now_s=5.0)
    assert TurnedDown(PeerId("far"), Span(1, 3), "holds no block of 3:6") in narrow.turned_down


@settings(deadline=None)
@given(worlds())
def test_edges_add_up_to_what_the_route_costs(world: tuple[list[ServerInfo], dict[PeerId, float]]) -> None:
    servers, rtts = world
    if not any(every_route(servers, 0, NUM_BLOCKS)):
        return
    planner = DStarLitePlanner()
    planner.update(servers, rtts)
    told = planner.explain(WHOLE, now_s=0.0)
    assert sum(edge.cost_us for edge in told.edges) == told.route.cost_us
    assert {one.peer_id for one in told.turned_down} == {one.peer_id for one in servers} - {
        hop.peer_id for hop in told.route.hops
    }
