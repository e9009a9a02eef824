"""The store: newest wins, nothing expired comes out, and every limit holds whatever comes in."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.dht.config import StoreLimits
from p2pswarm.dht.contact import ID_BYTES
from p2pswarm.dht.record import KEY_BYTES, SHORT_DIGEST_BYTES, RecordChecker, Refusal, SignedRecord, make_record
from p2pswarm.dht.store import RecordStore
from p2pswarm.net.identity import Identity

NOW_UNIX_S = 1_700_000_000.0
OWNERS = [Identity.generate(bytes([index]) * 32) for index in range(1, 5)]
NEAR, FAR = bytes([0x01]) * KEY_BYTES, bytes([0xF0]) * KEY_BYTES
"""As seen from a node whose id is all zeros."""


def make_store(**limits: float) -> RecordStore:
    chosen = StoreLimits(**limits)
    return RecordStore(bytes(ID_BYTES), RecordChecker(chosen), chosen)


def record(
    owner: int = 0, key: bytes = NEAR, sequence: int = 1, lifetime_s: float = 60, value: bytes = b"value"
) -> SignedRecord:
    return make_record(OWNERS[owner], key, value, sequence, NOW_UNIX_S + lifetime_s)


def test_a_newer_record_takes_the_place_of_an_older_one():
    store = make_store()
    assert store.put(record(sequence=1), NOW_UNIX_S) is None
    assert store.put(record(sequence=2), NOW_UNIX_S) is None
    assert store.get(NEAR, NOW_UNIX_S) == [record(sequence=2)]
    assert store.num_records == 1


def test_a_replayed_older_record_is_refused():
    store = make_store()
    store.put(record(sequence=2), NOW_UNIX_S)
    assert store.put(record(sequence=1), NOW_UNIX_S) is Refusal.OLDER
    assert store.get(NEAR, NOW_UNIX_S) == [record(sequence=2)]


def test_another_record_with_the_same_sequence_number_is_refused_and_the_same_one_taken_again():
    store = make_store()
    store.put(record(value=b"first"), NOW_UNIX_S)
    assert store.put(record(value=b"second"), NOW_UNIX_S) is Refusal.OLDER
    assert store.put(record(value=b"first"), NOW_UNIX_S) is None


def test_a_record_does_not_come_out_once_it_has_expired():
    store = make_store()
    store.put(record(lifetime_s=60), NOW_UNIX_S)
    assert store.get(NEAR, NOW_UNIX_S + 59)
    assert store.get(NEAR, NOW_UNIX_S + 60) == []
    assert store.page(NEAR, frozenset(), 10_000, NOW_UNIX_S + 60) == ([], False)
    store.purge(NOW_UNIX_S + 60)
    assert (store.num_records, store.size_bytes, store.held_keys()) == (0, 0, [])


def test_each_owner_has_its_own_record_under_a_key():
    store = make_store()
    for owner in range(3):
        assert store.put(record(owner), NOW_UNIX_S) is None
    assert {each.owner for each in store.get(NEAR, NOW_UNIX_S)} == {owner.peer_id for owner in OWNERS[:3]}


def test_an_owner_at_its_limit_may_renew_but_not_add():
    store = make_store(max_records_per_owner=1)
    store.put(record(key=NEAR), NOW_UNIX_S)
    assert store.put(record(key=FAR), NOW_UNIX_S) is Refusal.OWNER_FULL
    assert store.put(record(key=NEAR, sequence=2), NOW_UNIX_S) is None
    assert store.put(record(1, key=FAR), NOW_UNIX_S) is None


def test_an_owner_may_not_hold_more_bytes_than_its_limit():
    store = make_store(max_bytes_per_owner=1000)
    assert store.put(record(key=NEAR, value=bytes(600)), NOW_UNIX_S) is None
    assert store.put(record(key=FAR, value=bytes(600)), NOW_UNIX_S) is Refusal.OWNER_FULL
    assert store.put(record(key=NEAR, value=bytes(900), sequence=2), NOW_UNIX_S) is Refusal.OWNER_FULL


def test_a_key_at_its_limit_keeps_the_established_owners():
    store = make_store(max_records_per_key=2)
    store.put(record(0), NOW_UNIX_S)
    store.put(record(1), NOW_UNIX_S)
    assert store.put(record(2), NOW_UNIX_S) is Refusal.KEY_FULL
    assert store.put(record(0, sequence=2), NOW_UNIX_S) is None


def test_what_has_expired_makes_room():
    store = make_store(max_records_per_key=1)
    store.put(record(0, lifetime_s=10), NOW_UNIX_S)
    assert store.put(record(1), NOW_UNIX_S + 11) is None


def test_a_full_store_gives_up_the_farthest_key_and_refuses_farther_ones():
    store = make_store(max_records=2)
    middle = bytes([0x70]) * KEY_BYTES
    store.put(record(key=FAR), NOW_UNIX_S)
    store.put(record(key=middle), NOW_UNIX_S)
    assert store.put(record(key=NEAR), NOW_UNIX_S) is None
    assert set(store.held_keys()) == {NEAR, middle}
    assert store.put(record(key=FAR), NOW_UNIX_S) is Refusal.STORE_FULL


def test_paging_by_what_is_known_brings_every_record_once():
    store = make_store()
    for owner in range(4):
        store.put(record(owner, value=bytes(100)), NOW_UNIX_S)
    known: set[bytes] = set()
    received: list[SignedRecord] = []
    has_more = True
    while has_more:
        page, has_more = store.page(NEAR, known, 2 * record(value=bytes(100)).size_bytes, NOW_UNIX_S)
        assert 0 < len(page) <= 2
        received += page
        known |= {each.digest()[:SHORT_DIGEST_BYTES] for each in page}
    assert Counter(each.owner for each in received) == {owner.peer_id: 1 for owner in OWNERS}


commands = st.tuples(
    st.integers(0, 3), st.integers(0, 5), st.integers(0, 3), st.sampled_from([5, 50]), st.integers(0, 300)
)


@settings(deadline=None, max_examples=60)
@given(st.lists(commands, max_size=40))
def test_no_limit_is_ever_exceeded_and_nothing_expired_comes_out(puts: list[tuple[int, int, int, int, int]]):
    limits = StoreLimits(
        max_records=5, max_bytes=1500, max_records_per_key=2, max_records_per_owner=3, max_bytes_per_owner=700
    )
    store = RecordStore(bytes(ID_BYTES), RecordChecker(limits), limits)
    for step, (owner, key, sequence, lifetime_s, size) in enumerate(puts):
        now_unix_s = NOW_UNIX_S + step
        made = make_record(OWNERS[owner], bytes([40 * key]) * KEY_BYTES, bytes(size), sequence, now_unix_s + lifetime_s)
        was_taken = store.put(made, now_unix_s) is None
        assert (made in store.get(made.key, now_unix_s)) is was_taken
        everything = [each for key in store.held_keys() for each in store.get(key, now_unix_s)]
        by_owner = Counter(each.owner for each in everything)
        assert all(each.expires_unix_s > now_unix_s for each in everything)
        assert len(everything) <= store.num_records <= limits.max_records
        assert sum(each.size_bytes for each in everything) <= store.size_bytes <= limits.max_bytes
        assert all(count <= limits.max_records_per_owner for count in by_owner.values())
        assert all(len(store.get(key, now_unix_s)) <= limits.max_records_per_key for key in store.held_keys())
