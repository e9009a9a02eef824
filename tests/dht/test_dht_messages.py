"""Messages: the bytes come back as they were said, and whatever else comes is refused with a reason."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import MalformedMessage, UnknownMessage
from p2pswarm.dht.contact import ID_BYTES, Contact, usable_addresses
from p2pswarm.dht.messages import (
    DHT_LIMITS,
    MAX_RECORDS_PER_STORE,
    PAGE_BYTES,
    Envelope,
    Failure,
    FindNode,
    FindRecords,
    FoundNodes,
    FoundRecords,
    Ping,
    Pong,
    Reply,
    Request,
    Store,
    Stored,
    decode_message,
    encode_message,
)
from p2pswarm.dht.record import KEY_BYTES, SHORT_DIGEST_BYTES, Refusal, make_record
from p2pswarm.net.identity import Identity
from p2pswarm.wire.frames import Frame, FrameDecoder, encode_frame

IDENTITIES = [Identity.generate(bytes([index]) * 32) for index in range(1, 5)]
SENDER = IDENTITIES[0].peer_id
ADDRESS = f"/ip4/10.0.0.1/tcp/4001/p2p/{SENDER}"
CONTACTS = [
    Contact(each.peer_id, (f"/ip4/10.0.0.2/tcp/4001/p2p/{each.peer_id}", f"/dns/example.org/tcp/1/p2p/{each.peer_id}"))
    for each in IDENTITIES
]
RECORDS = [make_record(each, bytes(KEY_BYTES), b"value", 1, 1_700_000_000) for each in IDENTITIES]

any_contacts = st.lists(st.sampled_from(CONTACTS), max_size=4).map(tuple)
any_records = st.lists(st.sampled_from(RECORDS), max_size=4).map(tuple)
any_message = st.one_of(
    st.just(Ping()),
    st.just(Pong()),
    st.builds(FindNode, st.binary(min_size=ID_BYTES, max_size=ID_BYTES)),
    st.builds(FoundNodes, any_contacts),
    st.builds(
        FindRecords,
        st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES),
        st.frozensets(st.binary(min_size=SHORT_DIGEST_BYTES, max_size=SHORT_DIGEST_BYTES)),
    ),
    st.builds(FoundRecords, any_records, st.booleans(), any_contacts),
    st.builds(Store, any_records),
    st.builds(Stored, st.lists(st.none() | st.sampled_from(Refusal), max_size=9).map(tuple)),
    st.builds(Failure, st.text(max_size=100)),
)


def framed(pieces: list[bytes]) -> Frame:
    decoder = FrameDecoder(DHT_LIMITS, SENDER)
    decoder.feed(b"".join(pieces))
    frame = decoder.next_frame()
    assert frame is not None
    return frame


def decoded(header: dict[str, object], body: bytes = b"") -> Envelope:
    return decode_message(framed(encode_frame(header, [body])), SENDER)


@settings(deadline=None)
@given(any_message)
def test_messages_come_back_as_they_were(message: Request | Reply):
    assert decode_message(framed(encode_message(message, [ADDRESS])), SENDER) == Envelope(message, (ADDRESS,))


def test_the_largest_answer_fits_into_a_frame():
    long_addresses = tuple(f"/dns/{'x' * 60}.{index}.org/tcp/4001/p2p/{SENDER}" for index in range(8))
    contacts = (Contact(SENDER, usable_addresses(SENDER, long_addresses)),) * 20
    count = PAGE_BYTES // RECORDS[0].size_bytes
    message = FoundRecords((RECORDS[0],) * count, False, contacts)
    assert decode_message(framed(encode_message(message, long_addresses)), SENDER).message == message


def test_an_unknown_type_is_told_apart_from_a_malformed_message():
    with pytest.raises(UnknownMessage, match="unknown type 'sing'"):
        decoded({"type": "sing"})


def test_unknown_fields_are_ignored():
    assert decoded({"type": "ping", "mood": "good"}).message == Ping()


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ({}, b""),
        ({"type": 7}, b""),
        ({"type": "ping", "from": "nowhere"}, b""),
        ({"type": "find_node"}, bytes(ID_BYTES - 1)),
        ({"type": "find_records"}, bytes(KEY_BYTES - 1)),
        ({"type": "find_records"}, bytes(KEY_BYTES + 1)),
        ({"type": "store"}, b"not a record"),
        ({"type": "store"}, RECORDS[0].encode() * (MAX_RECORDS_PER_STORE + 1)),
        ({"type": "found_nodes", "contacts": [["12D3KooWnobody", []]]}, b""),
        ({"type": "found_nodes", "contacts": [[SENDER, [7]]]}, b""),
        ({"type": "found_nodes", "contacts": [[SENDER, []]] * 65}, b""),
        ({"type": "found_records", "contacts": []}, b""),
        ({"type": "stored", "refusals": [None]}, b""),
    ],
)
def test_what_is_not_as_agreed_is_refused_by_name(header: dict[str, object], body: bytes):
    with pytest.raises(MalformedMessage, match=SENDER):
        decoded(header, body)


@pytest.mark.parametrize(
    "address",
    [
        f"/ip4/0.0.0.0/tcp/4001/p2p/{SENDER}",
        f"/ip4/10.0.0.1/tcp/0/p2p/{SENDER}",
        f"/ip4/10.0.0.1/udp/4001/p2p/{SENDER}",
        f"/ip4/10.0.0.1/tcp/4001/p2p/{IDENTITIES[1].peer_id}",
        "/ip4/10.0.0.1/tcp/4001",
        "",
    ],
)
def test_addresses_that_nobody_could_dial_are_left_out(address: str):
    assert decoded({"type": "ping", "from": [address, ADDRESS]}).sender_addresses == (ADDRESS,)
    assert decoded({"type": "found_nodes", "contacts": [[SENDER, [address]]]}).message == FoundNodes(())


def test_a_contact_has_at_most_eight_addresses_of_a_kilobyte_in_all():
    many = tuple(f"/ip4/10.0.0.{index}/tcp/4001/p2p/{SENDER}" for index in range(20))
    assert usable_addresses(SENDER, many) == many[:8]
    long = tuple(f"/dns/{'x' * 63}.{'y' * 63}.{'z' * 63}.{index}/tcp/4001/p2p/{SENDER}" for index in range(8))
    assert sum(map(len, usable_addresses(SENDER, long))) <= 1024


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    st.sampled_from(["ping", "find_node", "found_nodes", "find_records", "found_records", "store", "stored", "x"]),
    st.dictionaries(st.sampled_from(["from", "contacts", "more", "refusals", "message"]), json_like),
    st.binary(max_size=300),
)
def test_any_fields_and_any_body_are_a_message_or_a_refusal(kind: str, fields: dict[str, object], body: bytes):
    with contextlib.suppress(MalformedMessage):
        assert decoded({"type": kind, **fields}, body).message is not None
