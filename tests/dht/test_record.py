"""Records: what is signed, what is refused, and that the bytes come back as they were."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.dht.config import StoreLimits
from p2pswarm.dht.record import (
    KEY_BYTES,
    MAX_VALUE_BYTES,
    RecordChecker,
    Refusal,
    SignedRecord,
    decode_records,
    is_newer,
    make_record,
)
from p2pswarm.net.identity import Identity

NOW_UNIX_S = 1_700_000_000.0
KEY = bytes(range(KEY_BYTES))
OWNER = Identity.generate(b"\x01" * 32)
STRANGER = Identity.generate(b"\x02" * 32)
LIMITS = StoreLimits()


def record(
    value: bytes = b"value", sequence: int = 1, lifetime_s: float = 60.0, signer: Identity = OWNER, key: bytes = KEY
) -> SignedRecord:
    return make_record(signer, key, value, sequence, NOW_UNIX_S + lifetime_s)


def refusal(of: SignedRecord, now_unix_s: float = NOW_UNIX_S) -> Refusal | None:
    return RecordChecker(LIMITS).refusal(of, now_unix_s)


def test_a_record_of_the_signers_own_is_taken():
    assert refusal(record()) is None


@pytest.mark.parametrize(
    "change",
    [
        {"value": b"other"},
        {"sequence": 2},
        {"expires_unix_ms": int(NOW_UNIX_S * 1000) + 61_000},
        {"owner": STRANGER.peer_id},
        {"key": bytes(KEY_BYTES)},
        {"signature": bytes(64)},
    ],
)
def test_any_change_breaks_the_signature(change: dict[str, object]):
    assert refusal(replace(record(), **change)) is Refusal.BAD_SIGNATURE


def test_an_expired_record_is_refused_from_the_very_moment():
    assert refusal(record(lifetime_s=60), NOW_UNIX_S + 59.999) is None
    assert refusal(record(lifetime_s=60), NOW_UNIX_S + 60) is Refusal.EXPIRED


def test_a_lifetime_beyond_the_limit_is_refused_with_an_allowance_for_clocks():
    longest_s = LIMITS.max_lifetime_s + LIMITS.clock_allowance_s
    assert refusal(record(lifetime_s=longest_s)) is None
    assert refusal(record(lifetime_s=longest_s + 1)) is Refusal.TOO_LONG_LIVED


def test_the_largest_value_is_taken_and_one_byte_more_refused():
    assert refusal(record(value=bytes(MAX_VALUE_BYTES))) is None
    assert refusal(record(value=bytes(MAX_VALUE_BYTES + 1))) is Refusal.TOO_LARGE


@pytest.mark.parametrize(
    "change",
    [{"key": b"short"}, {"signature": b"short"}, {"owner": ""}, {"owner": "1" * 65}, {"sequence": 1 << 64}],
)
def test_what_is_not_shaped_like_a_record_is_malformed(change: dict[str, object]):
    assert refusal(replace(record(), **change)) is Refusal.MALFORMED


def test_a_remembered_signature_does_not_make_an_expired_record_good():
    checker = RecordChecker(LIMITS)
    assert checker.refusal(record(), NOW_UNIX_S) is None
    assert checker.refusal(record(), NOW_UNIX_S + 61) is Refusal.EXPIRED


def test_a_remembered_signature_does_not_vouch_for_another_record():
    checker = RecordChecker(LIMITS, max_remembered=1)
    good = record()
    assert checker.refusal(good, NOW_UNIX_S) is None
    assert checker.refusal(replace(good, value=b"valuf"), NOW_UNIX_S) is Refusal.BAD_SIGNATURE
    assert checker.refusal(record(sequence=2), NOW_UNIX_S) is None
    assert checker.refusal(good, NOW_UNIX_S) is None


def test_only_a_higher_sequence_number_is_newer():
    assert is_newer(record(sequence=1), None)
    assert is_newer(record(sequence=2), record(sequence=1))
    assert not is_newer(record(sequence=1), record(sequence=1))
    assert not is_newer(record(sequence=1), record(sequence=2))


any_record = st.builds(
    SignedRecord,
    key=st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES),
    owner=st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZ", min_size=1, max_size=64),
    sequence=st.integers(0, 2**64 - 1),
    expires_unix_ms=st.integers(0, 2**64 - 1),
    value=st.binary(max_size=200),
    signature=st.binary(min_size=64, max_size=64),
)


@given(st.lists(any_record, max_size=5))
def test_records_come_back_as_they_were(records: list[SignedRecord]):
    data = b"".join(each.encode() for each in records)
    assert decode_records(memoryview(data)) == records
    assert len(data) == sum(each.size_bytes for each in records)


@given(any_record, st.data())
def test_a_record_cut_short_is_noticed(whole: SignedRecord, data: st.DataObject):
    length = data.draw(st.integers(1, whole.size_bytes - 1))
    with pytest.raises(ValueError, match="cut short"):
        decode_records(memoryview(whole.encode()[:length]))


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_records_or_an_error_and_never_valid(data: bytes):
    try:
        records = decode_records(memoryview(data))
    except ValueError:
        return
    assert all(refusal(each) is not None for each in records)
