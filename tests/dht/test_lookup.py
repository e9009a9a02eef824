"""The course of a lookup: parallelism, patience, and that it ends at the closest living nodes."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.ids import PeerId
from p2pswarm.dht.contact import ID_BYTES, Contact, closest
from p2pswarm.dht.lookup import Lookup, LookupLimits

TARGET = bytes(ID_BYTES)
LIMITS = LookupLimits(k=8, alpha=3, quorum=4, window=8, max_requests=60, stagger_s=0.1)


def contact(number: int) -> Contact:
    return Contact(PeerId(f"peer {number}"), (f"/ip4/10.0.0.1/tcp/4001/p2p/peer {number}",))


BY_DISTANCE = closest(map(contact, range(100)), TARGET, 100)


def make_lookup(start: list[Contact], limits: LookupLimits = LIMITS, connected: list[Contact] | None = None) -> Lookup:
    connected_peers = {each.peer_id for each in connected or []}
    return Lookup(TARGET, start, limits, lambda: connected_peers)


def test_it_begins_with_the_alpha_closest():
    assert make_lookup(BY_DISTANCE[:20]).next_to_ask(0.0) == BY_DISTANCE[:3]


def test_connected_peers_are_asked_before_closer_ones():
    lookup = make_lookup(BY_DISTANCE[:20], connected=[BY_DISTANCE[5], BY_DISTANCE[19]])
    assert lookup.next_to_ask(0.0) == [BY_DISTANCE[5], BY_DISTANCE[0], BY_DISTANCE[1]]


def test_nobody_else_is_asked_while_alpha_requests_are_fresh():
    lookup = make_lookup(BY_DISTANCE[:20])
    lookup.next_to_ask(0.0)
    assert lookup.next_to_ask(0.05) == []
    assert lookup.wake_at_s(0.05) == pytest.approx(0.1)


def test_it_goes_on_while_requests_are_pending():
    lookup = make_lookup(BY_DISTANCE[:20])
    lookup.next_to_ask(0.0)
    assert lookup.next_to_ask(0.1) == BY_DISTANCE[3:6]


def test_a_silent_peer_does_not_hold_up_the_end_as_long_as_enough_others_answer():
    lookup = make_lookup(BY_DISTANCE[:20])
    silent, *others = lookup.next_to_ask(0.0)
    for each in [*others, *lookup.next_to_ask(0.2)]:
        lookup.answered(each.peer_id, [])
    assert lookup.is_finished
    assert silent not in lookup.closest_answered()


def test_it_waits_for_the_silent_when_there_is_nobody_else():
    lookup = make_lookup(BY_DISTANCE[:3])
    late, *others = lookup.next_to_ask(0.0)
    for each in others:
        lookup.answered(each.peer_id, [])
    assert not lookup.is_finished
    lookup.answered(late.peer_id, [])
    assert lookup.closest_answered() == BY_DISTANCE[:3]
    assert lookup.is_finished


def test_answers_from_outside_the_window_do_not_make_a_quorum():
    limits = LookupLimits(k=8, alpha=3, quorum=2, window=4, max_requests=60, stagger_s=0.1)
    lookup = make_lookup(BY_DISTANCE[20:23], limits)
    for each in lookup.next_to_ask(0.0):
        lookup.answered(each.peer_id, BY_DISTANCE[:4])
    assert not lookup.is_finished
    for each in lookup.next_to_ask(0.01):
        lookup.answered(each.peer_id, [])
    assert lookup.is_finished


def test_closer_contacts_that_are_named_are_asked_next():
    lookup = make_lookup(BY_DISTANCE[50:53])
    first, *_ = lookup.next_to_ask(0.0)
    lookup.answered(first.peer_id, BY_DISTANCE[:2])
    assert lookup.next_to_ask(0.01) == BY_DISTANCE[:1]


def test_without_gain_as_many_are_asked_as_the_end_wants():
    limits = LookupLimits(k=20, alpha=3, quorum=20, window=20, max_requests=60, stagger_s=0.1)
    lookup = make_lookup(BY_DISTANCE[:20], limits)
    for each in lookup.next_to_ask(0.0):
        lookup.answered(each.peer_id, BY_DISTANCE[:20])
    assert lookup.next_to_ask(0.01) == BY_DISTANCE[3:20]


def test_it_ends_when_nobody_is_left():
    lookup = make_lookup(BY_DISTANCE[:2])
    for each in lookup.next_to_ask(0.0):
        assert not lookup.is_finished
        lookup.failed(each.peer_id)
    assert lookup.is_finished
    assert lookup.closest_answered() == []
    assert lookup.wake_at_s(0.0) == math.inf


def test_without_anyone_to_start_from_it_is_finished():
    assert make_lookup([]).is_finished


def test_a_liar_who_invents_contacts_cannot_keep_it_going():
    lookup = make_lookup(BY_DISTANCE[:1])
    invented = iter(contact(number) for number in range(1000, 100_000))
    now_s = 0.0
    while not lookup.is_finished:
        asked = lookup.next_to_ask(now_s)
        for each in asked:
            if lookup.num_requests == 1:
                lookup.answered(each.peer_id, [next(invented) for _ in range(500)])
            else:
                lookup.failed(each.peer_id)
        now_s += 0.01
    assert lookup.num_requests <= LIMITS.max_requests


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_writer_ends_with_exactly_the_closest_living_nodes(data: st.DataObject):
    """Whoever lives names the closest sixty; the dead fail at once, the hung after two seconds."""
    limits = LookupLimits(k=8, alpha=3, quorum=8, window=8, max_requests=1000, stagger_s=0.1)
    fates = data.draw(st.lists(st.sampled_from(["lives", "lives", "dead", "hung"]), min_size=100, max_size=100))
    fate_of = {each.peer_id: fate for each, fate in zip(BY_DISTANCE, fates, strict=True)}
    living = [each for each in BY_DISTANCE if fate_of[each.peer_id] == "lives"]
    start = data.draw(st.lists(st.sampled_from(living), min_size=1, max_size=5, unique=True)) if living else []
    lookup = make_lookup(start, limits)
    hung: dict[PeerId, float] = {}
    now_s = 0.0
    while not lookup.is_finished:
        for each in lookup.next_to_ask(now_s):
            if fate_of[each.peer_id] == "lives":
                lookup.answered(each.peer_id, BY_DISTANCE[:60])
            elif fate_of[each.peer_id] == "dead":
                lookup.failed(each.peer_id)
            else:
                hung[each.peer_id] = now_s
        now_s = min(lookup.wake_at_s(now_s), now_s + 1.0)
        for peer_id in [peer_id for peer_id, asked_at_s in hung.items() if asked_at_s + 2 <= now_s]:
            lookup.failed(peer_id)
            del hung[peer_id]
    reachable = [each for each in living if each in BY_DISTANCE[:60] or each in start]
    assert lookup.closest_answered() == (reachable[:8] if start else [])
