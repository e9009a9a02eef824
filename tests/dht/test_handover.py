"""Handing records to newcomers: the right ones get them, and not from everybody."""

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.ids import PeerId
from p2pswarm.dht.contact import Contact, closest, key_id_of, node_id_of
from p2pswarm.dht.handover import NUM_SENDERS, keys_to_hand_over
from p2pswarm.dht.record import KEY_BYTES

K = 4
CONTACTS = [Contact(PeerId(f"peer {number}"), (f"/ip4/10.0.0.1/tcp/1/p2p/peer {number}",)) for number in range(40)]
any_key = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)


def senders(key: bytes, newcomer: Contact, settled: list[Contact], others: list[Contact]) -> list[Contact]:
    """Which of the settled contacts send the record, each knowing all the others."""
    return [
        holder
        for holder in settled
        if keys_to_hand_over(
            [key],
            node_id_of(holder.peer_id),
            newcomer,
            [other for other in others if other != holder],
            [other for other in settled if other != holder],
            K,
        )
    ]


@settings(deadline=None)
@given(any_key, st.integers(1, 39))
def test_a_newcomer_gets_a_record_from_the_few_closest_holders_if_it_belongs_there(key: bytes, count: int):
    newcomer, others = CONTACTS[0], CONTACTS[1 : count + 1]
    belongs_there = newcomer in closest([newcomer, *others], key_id_of(key), K)
    wanted = closest(others, key_id_of(key), NUM_SENDERS) if belongs_there else []
    assert set(senders(key, newcomer, others, others)) == set(wanted)


@settings(deadline=None)
@given(any_key)
def test_who_came_lately_is_not_relied_upon(key: bytes):
    holder, newcomer = closest(CONTACTS, key_id_of(key), 2)
    assert senders(key, newcomer, [holder], CONTACTS[:]) == [holder]
    far_holder = closest(CONTACTS, key_id_of(key), 40)[-1]
    assert senders(key, newcomer, [far_holder], CONTACTS[:]) == [far_holder]
