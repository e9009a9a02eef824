"""One planner for all sessions: its routes are those of a search from scratch, its work only where things changed."""

import random
from dataclasses import replace
from itertools import pairwise

import networkx
import pytest
from routing_worlds import NUM_BLOCKS, names, near, server

from p2pswarm.core.errors import MissingBlocksError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import BanList, BanReason
from p2pswarm.routing.costs import CostModel
from p2pswarm.routing.dstar_planner import MAX_GRAPHS, DStarLitePlanner
from p2pswarm.routing.graph import TIES, AtClient, SpanGraph
from p2pswarm.routing.planner import RouteRequest
from p2pswarm.routing.prices import DecodePrices
from p2pswarm.routing.route import Route
from p2pswarm.routing.shortest_path import ShortestPathPlanner

WHOLE = RouteRequest(Span(0, NUM_BLOCKS))
PEERS = [PeerId(f"peer{i}") for i in range(8)]


class ChangingSwarm:
    """Servers that come, go, move, slow down and fail at random, as a planner is told of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.servers: dict[PeerId, ServerInfo] = {}
        self.round_trips_s: dict[PeerId, float] = {}
        self.now_s = 0.0
        self.dstar, self.plain = DStarLitePlanner(bans=BanList(5.0)), ShortestPathPlanner(bans=BanList(5.0))
        for _ in range(6):
            self.join()

    def figure(self, *choices: float) -> float:
        return self.random.choice(choices)

    def join(self) -> None:
        """A newcomer, or one that is announced anew, perhaps with another span."""
        start = self.random.randrange(NUM_BLOCKS)
        peer_id = self.random.choice(PEERS)
        self.servers[peer_id] = server(
            peer_id,
            start,
            self.random.randint(start + 1, NUM_BLOCKS),
            rate=self.figure(0.0, 50.0, 100.0, 900.0),
            room=self.random.choice([0, 100, 1000]),
            max_length=self.random.choice([0, 0, 64, 256]),
            next_rtts_s={
                other: self.figure(0.001, 0.02, 0.3) for other in self.random.sample(PEERS, self.random.randrange(4))
            },
            dtype=self.random.choice(["float32", "float32", "bfloat16"]),
            using_relay=self.random.random() < 0.2,
        )

    def leave(self) -> None:
        self.servers.pop(self.random.choice(PEERS), None)

    def change(self) -> None:
        """One figure or fact of one server is another one, by little or by much."""
        peer_id = self.random.choice(PEERS)
        info = self.servers.get(peer_id)
        if info is None:
            return
        by = self.figure(0.5, 0.95, 1.0, 1.05, 2.0)
        self.servers[peer_id] = self.random.choice(
            [
                replace(info, inference_tokens_per_s=info.inference_tokens_per_s * by),
                replace(info, queue_delay_s=self.figure(0.0, 0.0005, 0.05)),
                replace(info, next_rtts_s={peer: rtt_s * by for peer, rtt_s in info.next_rtts_s.items()}),
                replace(info, cache_tokens_left=self.random.choice([0, 100, 1000])),
                replace(info, state=self.random.choice([ServerState.ONLINE, ServerState.DRAINING])),
                replace(info, public_name=f"renamed {self.random.random()}"),
            ]
        )

    def measure(self) -> None:
        peer_id = self.random.choice(PEERS)
        rtt_s = self.round_trips_s.get(peer_id, self.figure(0.001, 0.05, 0.4))
        self.round_trips_s[peer_id] = rtt_s * self.figure(0.5, 0.95, 1.05, 2.0)

    def ban(self) -> None:
        peer_id = self.random.choice(PEERS)
        for planner in (self.dstar, self.plain):
            planner.ban(peer_id, self.now_s, BanReason.UNREACHABLE)

    def forgive(self) -> None:
        peer_id = self.random.choice(PEERS)
        for planner in (self.dstar, self.plain):
            planner.forgive(peer_id)

    def pass_time(self) -> None:
        self.now_s += self.figure(1.0, 6.0)

    def change_something(self) -> None:
        for _ in range(self.random.randint(0, 4)):
            change = [
                self.join,
                self.leave,
                self.change,
                self.change,
                self.measure,
                self.ban,
                self.forgive,
                self.pass_time,
            ]
            self.random.choice(change)()
        for planner in (self.dstar, self.plain):
            planner.update(self.servers.values(), self.round_trips_s)

    def request(self) -> RouteRequest:
        start, end = sorted(self.random.sample(range(NUM_BLOCKS + 1), 2))
        whole = self.random.random() < 0.7
        return RouteRequest(
            Span(0 if whole else start, NUM_BLOCKS if whole or self.random.random() < 0.5 else end),
            max_length=self.random.choice([0, 50, 60, 200, 2000]),
            avoided=frozenset(self.random.sample(PEERS, self.random.choice([0, 0, 0, 1]))),
            pushes=self.random.random() < 0.8,
        )


def planned(planner: ShortestPathPlanner, request: RouteRequest, now_s: float) -> Route | str:
    """The route, or what the error says."""
    try:
        return planner.plan(request, now_s)
    except MissingBlocksError as error:
        return str(error)


def run_changes(seed: int) -> None:
    swarm = ChangingSwarm(seed)
    try:
        for _ in range(12):
            swarm.change_something()
            for _ in range(swarm.random.randint(0, 3)):
                request = swarm.request()
                assert planned(swarm.dstar, request, swarm.now_s) == planned(swarm.plain, request, swarm.now_s)
    except AssertionError as error:
        raise AssertionError(f"with seed {seed}") from error


def test_routes_are_those_of_a_search_from_scratch_after_any_changes() -> None:
    for seed in range(150):
        run_changes(seed)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_routes_are_those_of_a_search_from_scratch_after_five_thousand_sequences_of_changes() -> None:
    for seed in range(5000):
        run_changes(seed)


def test_plain_search_finds_what_networkx_finds() -> None:
    for seed in range(100):
        swarm = ChangingSwarm(seed)
        swarm.change_something()
        banned = swarm.plain.banned(swarm.now_s)
        online = {
            peer_id: info
            for peer_id, info in swarm.servers.items()
            if info.state is ServerState.ONLINE and peer_id not in banned
        }
        prices = DecodePrices(CostModel(), swarm.round_trips_s, 0)
        graph = networkx.DiGraph()
        graph.add_nodes_from([AtClient(0), AtClient(NUM_BLOCKS)])
        graph.add_weighted_edges_from(SpanGraph(online, range(NUM_BLOCKS + 1), prices, pushes=True).edges())
        route = planned(swarm.plain, WHOLE, swarm.now_s)
        if isinstance(route, str):
            assert not networkx.has_path(graph, AtClient(0), AtClient(NUM_BLOCKS))
        else:
            weight = networkx.dijkstra_path_length(graph, AtClient(0), AtClient(NUM_BLOCKS))
            assert route.cost_us == weight // TIES


def chain(num_columns: int = 20) -> list[ServerInfo]:
    """Several servers for each block of three."""
    return [server(f"{start}-{i:02}", start, start + 2) for start in (0, 2, 4) for i in range(num_columns)]


def test_nothing_is_searched_where_nothing_changed() -> None:
    planner = DStarLitePlanner()
    servers = chain()
    planner.update(servers, near("0-03", "2-05"))
    route = planner.plan(WHOLE, now_s=0.0)
    assert names(route) == [("0-03", "0:2"), ("2-05", "2:4"), ("4-00", "4:6")]
    before = planner.statistics()
    planner.update([replace(info) for info in servers], near("0-03", "2-05"))
    assert planner.plan(WHOLE, now_s=1.0) == route
    assert planner.plan(replace(WHOLE, span=Span(2, 6)), now_s=1.0).hops == route.hops[1:]
    assert planner.statistics() == before


def test_noise_neither_changes_the_route_nor_is_searched() -> None:
    planner = DStarLitePlanner()
    servers = chain()
    planner.update(servers, near("0-03", "0-04", rtt_s=0.1))
    route = planner.plan(WHOLE, now_s=0.0)
    before = planner.statistics()
    noisy = [replace(info, inference_tokens_per_s=95.0, queue_delay_s=0.0009) for info in servers]
    planner.update(noisy, near("0-03", rtt_s=0.11) | near("0-04", rtt_s=0.09))
    assert planner.plan(WHOLE, now_s=1.0) == route
    assert planner.statistics() == before


def test_slow_drift_is_noticed_in_the_end() -> None:
    planner = DStarLitePlanner()
    servers = [server("a", 0, 6), server("b", 0, 6)]
    for rtt_s in (0.100, 0.108, 0.114, 0.120):
        planner.update(servers, near("a", rtt_s=rtt_s) | near("b", rtt_s=0.11))
        chosen = names(planner.plan(WHOLE, now_s=0.0))
        assert chosen == [("a" if rtt_s < 0.115 else "b", "0:6")]


def test_loss_of_a_server_off_the_route_costs_less_than_a_search() -> None:
    planner = DStarLitePlanner()
    servers = chain()
    planner.update(servers, {})
    planner.plan(WHOLE, now_s=0.0)
    from_scratch = planner.statistics().num_popped
    planner.update([info for info in servers if info.peer_id != "2-11"], {})
    planner.ban(PeerId("4-12"), 0.0, BanReason.UNREACHABLE)
    planner.plan(WHOLE, now_s=0.0)
    assert planner.statistics().num_popped - from_scratch < from_scratch / 10


def test_requests_share_a_graph_unless_a_server_tells_them_apart() -> None:
    planner = DStarLitePlanner()
    planner.update([server("a", 0, 6, room=100), server("b", 0, 6, max_length=500)], {})
    for max_length in (10, 20, 100):
        planner.plan(replace(WHOLE, max_length=max_length), now_s=0.0)
        planner.plan(replace(WHOLE, max_length=max_length, span=Span(3, 6)), now_s=0.0)
    assert planner.statistics().num_graphs == 1
    planner.plan(replace(WHOLE, max_length=101), now_s=0.0)  # more than a has room for
    assert planner.statistics().num_graphs == 2
    planner.plan(replace(WHOLE, max_length=501), now_s=0.0)  # more than b takes
    assert planner.statistics().num_graphs == 3


def test_graphs_are_bounded_and_those_in_use_stay() -> None:
    planner = DStarLitePlanner()
    planner.update([server(f"{room:04}", 0, 6, room=room) for room in range(0, 2000, 100)], {})
    for max_length in range(50, 2000, 100):
        planner.plan(replace(WHOLE, max_length=max_length), now_s=0.0)
        planner.plan(replace(WHOLE, max_length=1), now_s=0.0)
    statistics = planner.statistics()
    assert statistics.num_graphs == MAX_GRAPHS
    planner.plan(replace(WHOLE, max_length=1), now_s=0.0)
    assert planner.statistics() == statistics


def test_hops_of_a_route_follow_one_another() -> None:
    for seed in range(30):
        swarm = ChangingSwarm(seed)
        swarm.change_something()
        route = planned(swarm.dstar, WHOLE, 0.0)
        if isinstance(route, Route):
            assert route.span == WHOLE.span
            assert all(before.peer_id != after.peer_id for before, after in pairwise(route.hops))
