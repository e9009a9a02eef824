"""A server that was not told which blocks to serve takes those that the swarm serves worst."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span, uncovered
from p2pswarm.placement.joining import settled_span, worst_served_span
from p2pswarm.placement.throughput import block_throughputs


def server(start: int, end: int, throughput: float = 10.0, state: ServerState = ServerState.ONLINE) -> ServerInfo:
    return ServerInfo(
        peer_id=PeerId(f"peer-{start}-{end}-{throughput}"),
        model_id=ModelId("m@0123456789abcdef"),
        span=Span(start, end),
        state=state,
        addresses=(),
        num_model_blocks=30,
        throughput_tokens_per_s=throughput,
        inference_tokens_per_s=100.0,
        forward_tokens_per_s=1000.0,
        network_tokens_per_s=1000.0,
        dtype="float32",
    )


def test_an_empty_swarm_is_filled_from_the_front() -> None:
    assert worst_served_span(30, 10, []) == Span(0, 10)


def test_the_gap_is_filled() -> None:
    assert worst_served_span(30, 10, [server(0, 10), server(20, 30)]) == Span(10, 20)


def test_servers_about_to_come_count_and_those_leaving_do_not() -> None:
    joining = server(0, 10, state=ServerState.JOINING)
    assert worst_served_span(20, 10, [joining]) == Span(10, 20)
    assert worst_served_span(20, 10, [replace(joining, state=ServerState.DRAINING)]) == Span(0, 10)


def test_a_server_that_has_measured_nothing_yet_counts_like_the_others() -> None:
    joining = server(0, 10, 0.0, ServerState.JOINING)
    assert worst_served_span(20, 10, [joining]) == Span(10, 20)
    assert block_throughputs(2, [server(0, 1, 5.0), server(0, 1, 7.0), server(1, 2, 0.0, ServerState.JOINING)]) == [
        12,
        6,
    ]


def test_the_weakest_server_is_helped_where_all_blocks_are_served() -> None:
    assert worst_served_span(30, 10, [server(0, 10, 5.0), server(10, 20, 3.0), server(20, 30, 9.0)]) == Span(10, 20)


def test_more_blocks_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="the model has 30 blocks, so --num-blocks 31 is too many"):
        worst_served_span(30, 31, [])


spans = st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda ends: ends[0] < ends[1])


@given(
    others=st.lists(st.tuples(spans, st.floats(0.5, 100.0)), max_size=6),
    num_blocks=st.integers(1, 12),
)
def test_no_other_window_holds_a_worse_served_block(
    others: list[tuple[tuple[int, int], float]], num_blocks: int
) -> None:
    servers = [server(start, end, throughput) for (start, end), throughput in others]
    chosen = worst_served_span(12, num_blocks, servers)
    throughputs = block_throughputs(12, servers)
    assert chosen.num_blocks == num_blocks
    assert min(throughputs[chosen.start : chosen.end]) == min(throughputs)


def newcomer(name: str, start: int, end: int) -> ServerInfo:
    return replace(server(start, end, 0.0, ServerState.JOINING), peer_id=PeerId(name))


def test_of_two_that_chose_the_same_the_higher_id_moves() -> None:
    one, other = newcomer("a", 0, 10), newcomer("b", 0, 10)
    assert settled_span(one, [one, other]) == Span(0, 10)
    assert settled_span(other, [one, other]) == Span(10, 20)


def test_who_came_with_other_blocks_or_is_ready_moves_nobody() -> None:
    own = newcomer("z", 10, 20)
    assert settled_span(own, [own, newcomer("a", 0, 10), newcomer("b", 0, 10)]) == Span(10, 20)
    assert settled_span(own, [own, server(0, 10), server(10, 20)]) == Span(10, 20)


def test_who_became_ready_meanwhile_counts_where_to_move() -> None:
    own = newcomer("z", 0, 10)
    assert settled_span(own, [own, newcomer("a", 0, 10), server(10, 20)]) == Span(20, 30)


@given(
    online=st.lists(st.tuples(spans, st.floats(0.5, 100.0)), max_size=4),
    num_blocks=st.integers(1, 12),
    num_newcomers=st.integers(1, 14),
)
@settings(deadline=None)
def test_many_that_start_at_once_end_up_where_they_would_have_one_after_the_other(
    online: list[tuple[tuple[int, int], float]], num_blocks: int, num_newcomers: int
) -> None:
    ready = [
        replace(server(start, end, throughput), peer_id=PeerId(f"ready-{number}"), num_model_blocks=12)
        for number, ((start, end), throughput) in enumerate(online)
    ]
    same = worst_served_span(12, num_blocks, ready)
    newcomers = [
        replace(newcomer(f"{number:02}", same.start, same.end), num_model_blocks=12) for number in range(num_newcomers)
    ]
    settled = [settled_span(own, [*ready, *newcomers]) for own in newcomers]
    in_turn: list[ServerInfo] = []
    for own in newcomers:
        span = worst_served_span(12, num_blocks, [*ready, *in_turn])
        in_turn.append(replace(own, span=span))
    assert settled == [own.span for own in in_turn]
    if not ready and num_newcomers * num_blocks >= 12:
        assert not uncovered(settled, Span(0, 12))
