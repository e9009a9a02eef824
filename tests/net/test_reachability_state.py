"""What a node makes of the reports of those who tried to dial it."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.ids import PeerId
from p2pswarm.core.reachability import Reachability
from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.nat.reachability import (
    CHECK_PERIOD_S,
    DOUBT_PERIOD_S,
    MAX_ROUNDS_REMEMBERED,
    ProbeReport,
    ReachabilityState,
)

PUBLIC, PRIVATE, UNKNOWN = Reachability.PUBLIC, Reachability.PRIVATE, Reachability.UNKNOWN
OUTSIDE, LAN = "198.51.100.7", "192.168.1.7"


def report(prober: str, *ports: int, host: str = OUTSIDE) -> ProbeReport:
    return ProbeReport(PeerId(prober), TcpAddress("ip4", host, 51234), frozenset(ports))


def after(*rounds: list[ProbeReport]) -> ReachabilityState:
    state = ReachabilityState()
    for reports in rounds:
        state = state.after(reports)
    return state


REACHED = [report("a", 4001), report("b", 4001)]
FAILED = [report("a"), report("b")]


def test_nothing_is_known_until_somebody_was_asked():
    assert after() == after([]) == after([], []) == ReachabilityState(UNKNOWN)


def test_two_who_agree_decide():
    assert after(REACHED).reachability is PUBLIC
    assert after(FAILED).reachability is PRIVATE


def test_the_only_one_who_could_be_asked_decides_too():
    assert after([report("a", 4001)]).reachability is PUBLIC
    assert after([report("a")]).reachability is PRIVATE


def test_one_against_one_decides_nothing_and_two_outvote_one():
    assert after([report("a", 4001), report("b")]).reachability is UNKNOWN
    assert after([report("a", 4001), report("b"), report("c")]).reachability is PRIVATE
    assert after([report("a", 4001), report("b"), report("c", 4001)]).reachability is PUBLIC


def test_one_peer_that_reports_twice_counts_once():
    assert after([report("a"), report("a"), report("b", 4001)]).reachability is UNKNOWN


def test_a_neighbour_who_gets_through_does_not_make_a_node_behind_a_router_public():
    state = after([report("neighbour", 4001, host=LAN), report("other", 4001, host=LAN), report("far")])
    assert state.reachability is PRIVATE
    assert state.confirmed == (TcpAddress("ip4", LAN, 4001),)


def test_a_swarm_in_one_room_is_public_to_itself():
    assert after([report("neighbour", 4001, host=LAN)]).reachability is PUBLIC


def test_where_others_got_through_is_remembered_until_they_fail_there():
    lan, outside = TcpAddress("ip4", LAN, 4001), TcpAddress("ip4", OUTSIDE, 4001)
    state = after(REACHED, [report("neighbour", 4001, host=LAN)])
    assert state.confirmed == (lan, outside)
    assert state.after(FAILED).confirmed == (lan, outside)
    assert state.after(FAILED).after(FAILED).confirmed == (lan,)


def test_neighbours_alone_do_not_overturn_what_others_found():
    neighbours = [report("neighbour", 4001, host=LAN), report("other", 4001, host=LAN)]
    assert after(FAILED, *[neighbours] * MAX_ROUNDS_REMEMBERED).reachability is PRIVATE


def test_a_host_at_which_nobody_sees_us_any_more_is_forgotten():
    elsewhere = [report("a", 4001, host="203.0.113.9"), report("b", 4001, host="203.0.113.9")]
    assert after(FAILED, *[elsewhere] * (MAX_ROUNDS_REMEMBERED + 2)).reachability is PUBLIC


def test_a_settled_verdict_takes_two_rounds_to_change():
    doubtful = after(REACHED, FAILED)
    assert (doubtful.reachability, doubtful.is_settled) == (PUBLIC, False)
    assert (doubtful.after(FAILED).reachability, doubtful.after(FAILED).is_settled) == (PRIVATE, True)


def test_a_doubt_ends_with_a_round_that_agrees():
    assert after(REACHED, FAILED, REACHED) == after(REACHED)
    assert after(REACHED, FAILED, REACHED, FAILED).reachability is PUBLIC


def test_a_round_without_reports_neither_strengthens_nor_ends_a_doubt():
    assert after(REACHED, FAILED, []).after(FAILED).reachability is PRIVATE


def test_after_a_change_of_addresses_one_round_decides_and_old_addresses_are_forgotten():
    moved = after(REACHED).after_move()
    assert (moved.reachability, moved.confirmed, moved.is_settled) == (PUBLIC, (), False)
    assert moved.after(FAILED).reachability is PRIVATE


def test_doubts_are_looked_into_soon():
    assert after(REACHED).next_check_s(Random(1)) > CHECK_PERIOD_S / 2
    for state in (after(), after(REACHED, FAILED), after(REACHED).after_move()):
        assert state.next_check_s(Random(1)) < 2 * DOUBT_PERIOD_S


ROUNDS = st.lists(
    st.lists(
        st.builds(
            lambda prober, host, is_reached: report(prober, *([4001] if is_reached else []), host=host),
            st.sampled_from("abcde"),
            st.sampled_from([OUTSIDE, LAN, "2001:db8::7"]),
            st.booleans(),
        ),
        max_size=6,
    ),
    max_size=12,
)


@given(ROUNDS)
def test_no_round_makes_a_settled_verdict_jump(rounds: list[list[ProbeReport]]):
    state = ReachabilityState()
    for reports in rounds:
        before, state = state, state.after(reports)
        if before.is_settled:
            assert state.reachability is before.reachability
        assert state.reachability is not UNKNOWN or before.reachability is UNKNOWN


@given(ROUNDS)
def test_the_order_of_reports_does_not_matter_where_each_peer_reports_once(rounds: list[list[ProbeReport]]):
    forwards, backwards = ReachabilityState(), ReachabilityState()
    for reports in rounds:
        once = list({one.prober: one for one in reports}.values())
        forwards, backwards = forwards.after(once), backwards.after(once[::-1])
        assert forwards.reachability is backwards.reachability
        assert set(forwards.confirmed) == set(backwards.confirmed)


@given(ROUNDS)
def test_a_confirmed_address_is_one_that_somebody_reported(rounds: list[list[ProbeReport]]):
    state = after(*rounds)
    assert set(state.confirmed) <= {address for reports in rounds for one in reports for address in one.reached}
