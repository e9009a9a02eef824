"""A server leaves its blocks only where the swarm is better off, and nobody is left without a block by it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_swarms import NUM_MODEL_BLOCKS, server, swarms

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.placement.rebalancing import Move, should_move
from p2pswarm.placement.throughput import block_throughputs, swarm_throughput

QUALITY = 0.75
qualities = st.sampled_from([0.5, 0.75, 0.9, 1.0])


def moves(servers: Sequence[ServerInfo], balance_quality: float = QUALITY) -> dict[str, Move]:
    """Who would move now, and where."""
    online = [info for info in servers if info.state is ServerState.ONLINE]
    found = {info.peer_id: should_move(info, servers, balance_quality) for info in online}
    return {peer_id: move for peer_id, move in found.items() if move is not None}


def moved(servers: Sequence[ServerInfo], spans: dict[PeerId, Span]) -> list[ServerInfo]:
    """The swarm when those have arrived."""
    return [
        replace(info, span=spans[info.peer_id], next_span=None) if info.peer_id in spans else info for info in servers
    ]


def holders(block: int, servers: Sequence[ServerInfo]) -> list[ServerInfo]:
    return [info for info in servers if info.state is ServerState.ONLINE and info.span.covers(block)]


def test_one_of_two_fills_the_gap_that_another_left() -> None:
    servers = [server("a", "0:10"), server("b", "0:10"), server("c", "20:30"), server("d", "20:30")]
    assert moves(servers) == {"a": Move(Span(10, 20), math.inf)}


def test_the_last_holder_stays_where_moving_would_not_serve_all_blocks_either() -> None:
    assert moves([server("a", "0:10"), server("b", "20:30")]) == {}


def test_the_last_holder_stays_where_all_blocks_are_served() -> None:
    assert moves([server("a", "0:15", 100.0), server("b", "15:30", 1.0), server("c", "16:30", 100.0)]) == {}


def test_a_last_holder_moves_where_nothing_works_without_it() -> None:
    servers = [server("a", "0:10"), server("b", "9:19"), server("c", "20:30")]  # nobody has block 19
    assert moves(servers) == {"b": Move(Span(10, 20), math.inf)}
    assert moves([*servers, server("d", "19:20", state=ServerState.JOINING)]) == {}


def test_all_are_placed_anew_where_single_moves_do_not_close_the_gap() -> None:
    servers = [server("a", "0:10"), server("b", "8:18"), server("c", "16:26"), server("d", "0:4")]  # not 26:30
    for _ in range(3):
        servers = moved(servers, {PeerId(peer_id): move.span for peer_id, move in moves(servers).items()})
    assert swarm_throughput(30, servers) > 0
    assert moves(servers) == {}


def test_one_that_is_still_loading_is_no_holder_yet() -> None:
    loading = server("b", "0:10", state=ServerState.JOINING)
    others = [server("a", "0:10"), server("c", "10:20", 2.0), server("d", "20:30", 10.0)]
    assert moves([*others, loading]) == {}
    assert moves([*others, replace(loading, state=ServerState.ONLINE)]) == {"a": Move(Span(10, 20), 5.0)}


def test_one_that_is_loading_the_missing_blocks_already_is_left_to_it() -> None:
    servers = [server("a", "0:10"), server("b", "0:10"), server("c", "20:30")]
    assert moves([*servers, server("d", "10:20", state=ServerState.JOINING)]) == {}
    assert moves([*servers, server("d", "0:10", state=ServerState.DRAINING, next_span="10:20")]) == {}
    assert moves([*servers, server("d", "10:20", state=ServerState.DRAINING)]) != {}


def test_several_worst_windows_are_helped_although_no_move_alone_raises_the_minimum() -> None:
    crowd = [server(f"crowd-{number}", "20:30") for number in range(6)]
    servers = [server("a", "0:10"), server("b", "10:20"), *crowd]
    assert swarm_throughput(30, moved(servers, {PeerId("crowd-0"): Span(0, 10)})) == swarm_throughput(30, servers)
    found = moves(servers)
    assert sorted(move.span for move in found.values()) == [Span(0, 10), Span(10, 20)]
    assert {move.gain for move in found.values()} == {2.0}


@pytest.mark.parametrize(("slow", "does_move"), [(5.0, True), (9.0, False)])
def test_the_gain_has_to_be_a_third(slow: float, does_move: bool) -> None:
    servers = [server("a", "0:15", 10.0), server("b", "0:15", 2.0), server("c", "15:30", slow)]
    # with b on the other side: the smaller of 10 and slow + 2, where slow was the smallest
    assert bool(moves(servers)) == does_move


def test_a_server_that_was_told_its_blocks_neither_moves_nor_is_counted_on() -> None:
    servers = [server("a", "0:10"), server("b", "0:10", is_pinned=True), server("c", "20:30")]
    assert moves(servers) == {"a": Move(Span(10, 20), math.inf)}
    assert moves([replace(info, is_pinned=True) for info in servers]) == {}


def test_of_several_that_announce_the_same_wish_the_lowest_id_goes_and_the_others_stay() -> None:
    gap = "10:20"
    online = [server("a", "0:10"), server("c", "20:30")]
    wishing = [server(name, span, next_span=gap) for name, span in (("d", "0:10"), ("e", "20:30"), ("f", "0:10"))]
    assert list(moves([*online, *wishing])) == ["d"]


def test_of_two_last_holders_one_goes_at_most() -> None:
    wishing = [server("a", "0:10", next_span="10:20"), server("b", "0:10", next_span="20:30")]
    assert "b" not in moves([*wishing, server("c", "10:30")])
    assert "b" not in moves(wishing)


def test_a_view_without_oneself_will_do() -> None:
    own = server("a", "0:10")
    others = [server("b", "0:10", is_pinned=True), server("c", "20:30")]
    assert should_move(own, others, QUALITY) == should_move(own, [own, *others], QUALITY) != None  # noqa: E711


def test_strangers_to_the_model_as_it_is_do_not_matter() -> None:
    servers = [server("a", "0:10"), server("b", "0:10"), server("c", "20:30")]
    assert moves([*servers, server("d", "10:200", num_model_blocks=200)]).keys() == moves(servers).keys() != set()


@given(servers=swarms(), balance_quality=qualities)
@settings(deadline=None, max_examples=150)
def test_no_move_lowers_the_minimum_or_takes_a_last_holder_away(
    servers: list[ServerInfo], balance_quality: float
) -> None:
    before = swarm_throughput(NUM_MODEL_BLOCKS, servers)
    for peer_id, move in moves(servers, balance_quality).items():
        after = moved(servers, {PeerId(peer_id): move.span})
        assert swarm_throughput(NUM_MODEL_BLOCKS, after) >= before - 1e-3 * len(servers)  # compared in thousandths
        assert move.gain > 1
        own = next(info for info in servers if info.peer_id == peer_id)
        assert move.span.num_blocks == own.span.num_blocks
        for block in range(own.span.start, own.span.end):
            assert before == 0 or any(other is not own for other in holders(block, servers))


@given(servers=swarms(), balance_quality=qualities)
@settings(deadline=None, max_examples=150)
def test_those_that_leave_at_the_same_moment_leave_a_holder_to_every_block(
    servers: list[ServerInfo], balance_quality: float
) -> None:
    is_served = swarm_throughput(NUM_MODEL_BLOCKS, servers) > 0
    wishes = moves(servers, balance_quality)
    announced = [
        replace(info, next_span=wishes[info.peer_id].span) if info.peer_id in wishes else info for info in servers
    ]
    going = {
        peer_id
        for peer_id in wishes
        if should_move(next(info for info in announced if info.peer_id == peer_id), announced, balance_quality)
    }
    staying = [info for info in servers if info.peer_id not in going]
    for block in range(NUM_MODEL_BLOCKS):
        assert bool(holders(block, staying)) == bool(holders(block, servers)) or not is_served


@given(servers=swarms((ServerState.ONLINE,)), balance_quality=qualities, seed=st.integers(0, 1000))
@settings(deadline=None)
def test_moving_one_after_the_other_ends(servers: list[ServerInfo], balance_quality: float, seed: int) -> None:
    random, num_moves = Random(seed), 0
    throughput = swarm_throughput(NUM_MODEL_BLOCKS, servers)
    while wishes := moves(servers, balance_quality):
        peer_id = random.choice(sorted(wishes))
        servers = moved(servers, {PeerId(peer_id): wishes[peer_id].span})
        num_moves += 1
        assert num_moves <= 5 * len(servers)
    assert swarm_throughput(NUM_MODEL_BLOCKS, servers) >= throughput - 1e-3 * len(servers)


@given(servers=swarms(), shuffled=st.randoms(use_true_random=False))
@settings(deadline=None)
def test_everybody_answers_the_same_in_whatever_order_the_swarm_is_seen(
    servers: list[ServerInfo], shuffled: Random
) -> None:
    other_order = shuffled.sample(servers, len(servers))
    assert moves(servers) == moves(other_order)
    assert block_throughputs(NUM_MODEL_BLOCKS, servers) == block_throughputs(NUM_MODEL_BLOCKS, other_order)


@given(servers=swarms(), balance_quality=qualities)
@settings(deadline=None)
def test_a_swarm_as_good_as_it_can_be_stays_as_it_is(servers: list[ServerInfo], balance_quality: float) -> None:
    throughputs = block_throughputs(NUM_MODEL_BLOCKS, servers)
    if min(throughputs) >= balance_quality * sum(throughputs) / NUM_MODEL_BLOCKS:
        assert moves(servers, balance_quality) == {}


@given(starts=st.lists(st.sampled_from([0, 3, 6, 9]), min_size=4, max_size=12))
@settings(deadline=None)
def test_equal_servers_end_up_spread_evenly_enough(starts: list[int]) -> None:
    servers = [
        server(f"{number:02}", f"{start}:{start + 3}", num_model_blocks=NUM_MODEL_BLOCKS)
        for number, start in enumerate(starts)
    ]
    while wishes := moves(servers):
        peer_id = min(wishes)
        servers = moved(servers, {PeerId(peer_id): wishes[peer_id].span})
    best = 10.0 * (len(starts) // 4)
    assert swarm_throughput(NUM_MODEL_BLOCKS, servers) >= QUALITY * best
