"""What a relay gives to whom."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.nat.relay_limits import Circuit, RelayAccounts, RelayLimits
from p2pswarm.net.nat.relay_messages import CircuitLimit, RelayStatus

ALICE, BOB, CAROL, DAVE = (PeerId(name) for name in ("alice", "bob", "carol", "dave"))


def opened(accounts: RelayAccounts, source: PeerId, target: PeerId, now_s: float = 0.0) -> Circuit:
    circuit = accounts.open_circuit(source, target, now_s)
    assert isinstance(circuit, Circuit)
    return circuit


def test_reservations_are_one_a_peer_and_bounded_in_all() -> None:
    accounts = RelayAccounts(RelayLimits(max_reservations=2))
    answers = [accounts.reserve(peer_id, 0.0) for peer_id in (ALICE, ALICE, BOB, CAROL)]
    assert answers == [RelayStatus.OK, RelayStatus.OK, RelayStatus.OK, RelayStatus.RESERVATION_REFUSED]
    accounts.release(ALICE)
    assert accounts.reserve(CAROL, 0.0) == RelayStatus.OK


def test_a_reservation_ends_with_its_time_or_its_connection() -> None:
    accounts = RelayAccounts(RelayLimits(reservation_s=60.0))
    accounts.reserve(ALICE, 0.0)
    accounts.reserve(BOB, 30.0)
    assert accounts.open_circuit(CAROL, ALICE, 60.0) == RelayStatus.NO_RESERVATION
    opened(accounts, CAROL, BOB, 60.0)
    accounts.drop_all_but({ALICE, CAROL})
    assert accounts.open_circuit(CAROL, BOB, 60.0) == RelayStatus.NO_RESERVATION


def test_circuits_are_bounded_by_source_by_target_and_in_all() -> None:
    accounts = RelayAccounts(RelayLimits(max_circuits=3, max_circuits_per_source=2, max_circuits_per_target=2))
    for target in (ALICE, BOB):
        accounts.reserve(target, 0.0)
    first = opened(accounts, CAROL, ALICE)
    opened(accounts, CAROL, BOB)
    assert accounts.open_circuit(CAROL, BOB, 0.0) == RelayStatus.RESOURCE_LIMIT_EXCEEDED
    opened(accounts, DAVE, ALICE)
    assert accounts.open_circuit(DAVE, ALICE, 0.0) == RelayStatus.RESOURCE_LIMIT_EXCEEDED
    assert accounts.open_circuit(DAVE, BOB, 0.0) == RelayStatus.RESOURCE_LIMIT_EXCEEDED
    accounts.close_circuit(first)
    accounts.close_circuit(first)
    opened(accounts, DAVE, BOB)
    assert accounts.statistics().num_circuits == 3
    assert accounts.statistics().num_refused == 3


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200_000), st.floats(0, 0.5)), min_size=1, max_size=100))
def test_the_rate_holds_over_all_circuits_and_any_time(pieces: list[tuple[int, float]]) -> None:
    rate = 1_000_000.0
    accounts = RelayAccounts(RelayLimits(rate_bytes_per_s=rate))
    accounts.reserve(ALICE, 0.0)
    circuits = [opened(accounts, CAROL, ALICE), opened(accounts, DAVE, ALICE)]
    now_s = relayed_bytes = 0.0
    for index, (num_bytes, pause_s) in enumerate(pieces):
        now_s += pause_s
        ready_at_s = accounts.relay(circuits[index % 2], num_bytes, now_s)
        relayed_bytes += num_bytes
        assert ready_at_s >= now_s
        assert relayed_bytes <= rate * (ready_at_s + 0.25) + 1
    assert accounts.statistics().relayed_bytes == relayed_bytes


def test_a_circuit_is_used_up_by_the_bytes_of_both_directions() -> None:
    accounts = RelayAccounts(RelayLimits(circuit_bytes=100))
    accounts.reserve(ALICE, 0.0)
    circuit = opened(accounts, BOB, ALICE)
    accounts.relay(circuit, 100, 0.0)
    assert not accounts.is_used_up(circuit)
    accounts.relay(circuit, 1, 0.0)
    assert accounts.is_used_up(circuit)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RelayLimits)])
def test_no_limit_may_be_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is above 0, or None for no limit, got 0"):
        RelayLimits(**{name: 0})


def test_no_limit_is_announced_where_there_is_none() -> None:
    assert RelayLimits(circuit_s=None, circuit_bytes=None).announced == CircuitLimit(None, None)
    assert RelayLimits(circuit_s=59.6, circuit_bytes=7).announced == CircuitLimit(60, 7)
