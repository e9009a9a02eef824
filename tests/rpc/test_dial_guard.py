"""How often strangers can have a node dial somebody."""

import random

from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.ids import PeerId
from p2pswarm.rpc.dial_guard import MAX_DIALS, MAX_DIALS_PER_ASKER, UNREACHABLE_S, WINDOW_S, DialGuard

CLIENT, OTHER = PeerId("client"), PeerId("other")


def target(number: int) -> PeerId:
    return PeerId(f"server-{number}")


def test_a_client_may_have_a_few_dialled_and_more_later() -> None:
    guard = DialGuard()
    permitted = [guard.permits(CLIENT, target(number), now_s=number / 10) for number in range(10)]
    assert permitted == [True] * MAX_DIALS_PER_ASKER + [False] * (10 - MAX_DIALS_PER_ASKER)
    assert guard.permits(OTHER, target(10), now_s=1.0)
    assert guard.permits(CLIENT, target(11), now_s=WINDOW_S)


def test_who_could_not_be_reached_is_left_alone_for_a_while() -> None:
    guard = DialGuard()
    assert guard.permits(CLIENT, target(0), now_s=0.0)
    guard.note_unreachable(target(0), now_s=1.0)
    assert not guard.permits(OTHER, target(0), now_s=UNREACHABLE_S)
    assert guard.permits(OTHER, target(0), now_s=UNREACHABLE_S + 1.0)


@given(st.integers(0, 1 << 32))
def test_no_crowd_gets_more_than_the_limit(seed: int) -> None:
    randomness = random.Random(seed)
    guard = DialGuard()
    dials: list[float] = []
    now_s = 0.0
    for number in range(500):
        now_s += randomness.expovariate(20)
        if guard.permits(PeerId(f"client-{randomness.randrange(100)}"), target(number), now_s):
            dials.append(now_s)
            if randomness.random() < 0.5:
                guard.note_unreachable(target(number), now_s)
    assert all(sum(first <= dial < first + WINDOW_S for dial in dials) <= MAX_DIALS for first in dials)
    assert len(dials) >= MAX_DIALS
