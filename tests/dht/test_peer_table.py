"""The routing table: exact neighbours, full buckets, and no trace of the process's clock."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.ids import PeerId
from p2pswarm.dht.contact import ID_BYTES, Contact, distance, node_id_of
from p2pswarm.dht.table import PeerTable, oldest_contact, random_id_in

K = 4
OWN_ID = node_id_of(PeerId("own"))


def contact(number: int) -> Contact:
    return Contact(PeerId(f"peer {number}"), (f"/ip4/10.0.0.1/tcp/4001/p2p/peer {number}",))


def filled_table(count: int, k: int = K) -> PeerTable:
    table = PeerTable(OWN_ID, k)
    for number in range(count):
        table.seen(contact(number), float(number))
    return table


@settings(deadline=None)
@given(st.integers(0, 200), st.binary(min_size=ID_BYTES, max_size=ID_BYTES), st.integers(1, 30))
def test_closest_is_exact(count: int, target_id: bytes, wanted: int):
    table = filled_table(count)
    contacts = sorted(table.contacts(), key=lambda each: distance(node_id_of(each.peer_id), target_id))
    assert table.closest(target_id, wanted) == contacts[:wanted]


@settings(deadline=None)
@given(st.integers(0, 300))
def test_buckets_hold_at_most_k_and_together_the_whole_space(count: int):
    table = filled_table(count)
    assert all(len(bucket) <= K for bucket in table.buckets)
    assert table.buckets[0].range[0] == 0
    assert table.buckets[-1].range[1] == 2**160 - 1
    edges = zip(table.buckets, table.buckets[1:], strict=False)
    assert all(lower.range[1] + 1 == upper.range[0] for lower, upper in edges)


def test_the_closest_k_to_ourselves_are_always_kept():
    table = filled_table(300)
    everyone = sorted(map(contact, range(300)), key=lambda each: distance(node_id_of(each.peer_id), OWN_ID))
    assert table.closest(OWN_ID, K) == everyone[:K]


def test_we_are_never_in_our_own_table():
    table = PeerTable(OWN_ID, K)
    assert table.seen(Contact(PeerId("own"), ("/ip4/10.0.0.1/tcp/1/p2p/own",)), 0.0) is None
    assert len(table) == 0


def test_a_full_bucket_names_the_contact_in_the_way_and_its_removal_lets_the_newcomer_in():
    table = PeerTable(OWN_ID, K)
    numbers = iter(range(10_000))
    while (in_the_way := table.seen(newcomer := contact(next(numbers)), 0.0)) is None:
        pass
    assert in_the_way.contact.peer_id in table
    assert newcomer.peer_id not in table
    table.remove(in_the_way.contact.peer_id)
    assert in_the_way.contact.peer_id not in table
    assert newcomer.peer_id in table


def test_a_contact_heard_of_again_is_no_longer_the_oldest():
    table = filled_table(3)
    bucket = table.buckets[0]
    assert oldest_contact(bucket) == contact(0)
    table.seen(contact(0), 9.0)
    assert oldest_contact(bucket) == contact(1)


def test_new_addresses_of_a_contact_take_the_place_of_the_old_ones():
    table = filled_table(1)
    moved = Contact(contact(0).peer_id, ("/ip4/10.9.9.9/tcp/4001/p2p/peer 0",))
    table.seen(moved, 9.0)
    assert list(table.contacts()) == [moved]


def test_removing_a_stranger_does_nothing():
    table = filled_table(3)
    table.remove(PeerId("stranger"))
    assert len(table) == 3


def test_the_stalest_bucket_is_the_one_refreshed_longest_ago():
    table = filled_table(100)
    for moment_s, bucket in enumerate(reversed(table.buckets)):
        bucket.refreshed_at_s = float(moment_s)
    assert table.stalest_bucket() is table.buckets[-1]


@given(st.integers(0, 2**32))
def test_random_ids_fall_into_their_bucket(seed: int):
    for bucket in filled_table(60).buckets:
        long_id = int.from_bytes(random_id_in(bucket, Random(seed)), "big")
        assert bucket.range[0] <= long_id <= bucket.range[1]


def test_a_contact_keeps_the_time_it_came_whatever_it_says_later():
    table = filled_table(3)
    table.seen(contact(0), 100.0)
    assert set(table.came_before(1.0)) == {contact(0), contact(1)}
    table.remove(contact(0).peer_id)
    table.seen(contact(0), 100.0)
    assert table.came_before(1.0) == [contact(1)]
