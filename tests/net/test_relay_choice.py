"""Which nodes are asked to relay."""

from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.ids import PeerId
from p2pswarm.net.nat.relay_choice import FIRST_PAUSE_S, MAX_PAUSE_S, MAX_REMEMBERED, RelayCandidate, RelayChoice


def candidate(name: str, host: str | None = None, round_trip_s: float | None = None) -> RelayCandidate:
    address = f"/ip4/{host or f'192.0.2.{ord(name[0])}'}/tcp/4001/p2p/{name}"
    return RelayCandidate(PeerId(name), (address,), round_trip_s)


NEAR, FAR, UNMEASURED = candidate("n", None, 0.01), candidate("f", None, 0.2), candidate("u")


def chosen(choice: RelayChoice, *candidates: RelayCandidate, held=(), wanted: int = 2, now_s: float = 0.0) -> list[str]:
    return [relay.peer_id for relay in choice.next_relays(candidates, held, wanted, now_s)]


def test_near_ones_come_first_and_those_never_measured_last():
    assert chosen(RelayChoice(), UNMEASURED, FAR, NEAR) == ["n", "f"]
    assert chosen(RelayChoice(), UNMEASURED, FAR, wanted=3) == ["f", "u"]


def test_only_what_is_missing_is_asked_for():
    assert chosen(RelayChoice(), NEAR, FAR, UNMEASURED, held=[NEAR]) == ["f"]
    assert chosen(RelayChoice(), NEAR, FAR, held=[NEAR, UNMEASURED]) == []


def test_two_relays_on_one_machine_are_taken_only_where_there_is_no_other():
    twin = candidate("t", "192.0.2.110", 0.011)
    assert chosen(RelayChoice(), NEAR, twin, FAR) == ["n", "f"]
    assert chosen(RelayChoice(), twin, FAR, held=[NEAR]) == ["f"]
    assert chosen(RelayChoice(), NEAR, twin) == ["n", "t"]


def test_loopback_addresses_make_no_two_nodes_one_machine():
    both = [
        RelayCandidate(PeerId(name), (f"/ip4/192.0.2.{number}/tcp/1", "/ip4/127.0.0.1/tcp/1"), float(number))
        for number, name in enumerate("abc")
    ]
    assert chosen(RelayChoice(), *both) == ["a", "b"]


def test_who_refused_is_left_alone_longer_each_time_and_asked_at_once_after_it_accepted():
    choice = RelayChoice()
    choice.refused(PeerId("n"), 0.0)
    assert chosen(choice, NEAR, FAR, now_s=FIRST_PAUSE_S - 1) == ["f"]
    assert chosen(choice, NEAR, FAR, now_s=FIRST_PAUSE_S) == ["n", "f"]
    choice.refused(PeerId("n"), 100.0)
    assert chosen(choice, NEAR, now_s=100 + FIRST_PAUSE_S) == []
    assert chosen(choice, NEAR, now_s=100 + 2 * FIRST_PAUSE_S) == ["n"]
    choice.accepted(PeerId("n"))
    assert chosen(choice, NEAR, now_s=0.0) == ["n"]


def test_nobody_is_left_alone_for_ever_nor_remembered_without_end():
    choice = RelayChoice()
    for _ in range(30):
        choice.refused(PeerId("n"), 0.0)
    assert chosen(choice, NEAR, now_s=MAX_PAUSE_S) == ["n"]
    for number in range(MAX_REMEMBERED):
        choice.refused(PeerId(f"other{number}"), 0.0)
    assert chosen(choice, NEAR, now_s=0.0) == ["n"]


@given(
    st.lists(
        st.builds(
            candidate, st.sampled_from("abcdefgh"), st.sampled_from(["10.0.0.1", "10.0.0.2", None]), st.floats(0, 1)
        ),
        unique_by=lambda one: one.peer_id,
    ),
    st.integers(0, 3),
    st.integers(0, 4),
)
def test_as_many_as_there_are_and_are_wanted_are_chosen_each_once(candidates, num_held: int, num_wanted: int):
    held = candidates[:num_held]
    names = chosen(RelayChoice(), *candidates, held=held, wanted=num_wanted)
    assert len(names) == len(set(names)) == max(0, min(num_wanted - len(held), len(candidates) - len(held)))
    assert not set(names) & {relay.peer_id for relay in held}
