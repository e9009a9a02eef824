"""What a server contributes, and what a swarm has of all of them."""

from dataclasses import replace

from placement_swarms import server

from p2pswarm.core.server_info import ServerState
from p2pswarm.core.span import Span
from p2pswarm.placement.throughput import block_throughputs, destination, server_throughput, swarm_throughput


def test_the_slower_of_compute_and_line_counts() -> None:
    assert server_throughput(1, 100.0, 1000.0) == 100.0
    assert server_throughput(9, 100.0, 1000.0) == 20.0  # a request uses five of nine blocks on average
    assert server_throughput(9, 100.0, 15.0) == 15.0


def test_a_relayed_line_counts_a_fifth() -> None:
    assert server_throughput(9, 100.0, 1000.0, using_relay=True) == 20.0
    assert server_throughput(9, 100.0, 50.0, using_relay=True) == 10.0


def test_the_swarm_is_as_fast_as_its_worst_block() -> None:
    servers = [server("a", "0:20", 5.0), server("b", "10:30", 3.0), server("c", "20:30", 1.0)]
    assert block_throughputs(30, servers) == [5.0] * 10 + [8.0] * 10 + [4.0] * 10
    assert swarm_throughput(30, servers) == 4.0
    assert swarm_throughput(30, servers[1:]) == 0.0


def test_a_server_counts_where_it_is_going() -> None:
    info = server("a", "0:10")
    assert destination(info) == Span(0, 10)
    going = replace(info, next_span=Span(5, 15))
    assert destination(going) == destination(replace(going, state=ServerState.DRAINING)) == Span(5, 15)
    assert destination(replace(info, state=ServerState.JOINING)) == Span(0, 10)
    assert destination(replace(info, state=ServerState.DRAINING)) is None
    assert destination(replace(going, state=ServerState.OFFLINE)) is None
