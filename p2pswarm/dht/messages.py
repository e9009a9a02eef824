"""What DHT nodes say to each other over a stream of `DHT_PROTOCOL`: four requests, their answers, and an error.

One frame (`wire/frames.py`) per message. The header names the type and the sender's own addresses, which only nodes
that serve give; ids, keys, digests and records, being bytes, are in the body. Requests on a stream are answered in
order. `docs/protocol-dht.md` is the page for strangers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, assert_never

from p2pswarm.core.errors import MalformedMessage, UnknownMessage
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.dht.contact import ID_BYTES, MAX_CONTACT_ADDRESSES, Contact, usable_addresses
from p2pswarm.dht.record import KEY_BYTES, SHORT_DIGEST_BYTES, Refusal, SignedRecord, decode_records
from p2pswarm.net.addresses import MAX_ADDRESS_LETTERS
from p2pswarm.net.identity import is_peer_id
from p2pswarm.wire.fields import Fields
from p2pswarm.wire.frames import Buffer, Frame, WireLimits, encode_frame

DHT_PROTOCOL = ProtocolId("/p2pswarm/dht/1")
PAGE_BYTES = 128 * 1024
"""Records in one answer or one Store: what a slow uplink (1 MB/s) sends in an eighth of a second."""
MAX_RECORDS_PER_STORE = 64
"""Checking a signature takes 0.13 ms: 64 new ones hold a storer up for 8 ms."""
MAX_KNOWN_DIGESTS = 8192
MAX_CONTACTS = 64
"""More than any k in use."""
DHT_LIMITS = WireLimits(max_frame_bytes=256 * 1024, max_header_bytes=64 * 1024, max_items=128)


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there?"""


@dataclass(frozen=True, slots=True)
class Pong:
    pass


@dataclass(frozen=True, slots=True)
class FindNode:
    """Whom do you know that is closest to this id?"""

    target_id: bytes


@dataclass(frozen=True, slots=True)
class FoundNodes:
    contacts: tuple[Contact, ...]


@dataclass(frozen=True, slots=True)
class FindRecords:
    """What do you hold under this key that I do not know, and who is closest to it?"""

    key: bytes
    known: frozenset[bytes] = frozenset()
    """Short digests of the records the reader has already."""


@dataclass(frozen=True, slots=True)
class FoundRecords:
    records: tuple[SignedRecord, ...]
    has_more: bool
    """Ask again, knowing these, to get more."""
    contacts: tuple[Contact, ...]


@dataclass(frozen=True, slots=True)
class Store:
    """Keep these, please."""

    records: tuple[SignedRecord, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    refusals: tuple[Refusal | None, ...]
    """For each record, in order; None where it was taken."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The request made no sense to the peer."""

    message: str


Request = Ping | FindNode | FindRecords | Store
Reply = Pong | FoundNodes | FoundRecords | Stored | Failure


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message and where its sender, if it serves, can be dialled."""

    message: Request | Reply
    sender_addresses: tuple[str, ...] = ()


def encode_message(message: Request | Reply, sender_addresses: Sequence[str]) -> list[Buffer]:
    """The frame to write."""
    header, body = _packed(message)
    return encode_frame({**header, "from": list(sender_addresses[:MAX_CONTACT_ADDRESSES])}, [body] if body else ())


def _packed(message: Request | Reply) -> tuple[dict[str, Any], bytes]:
    match message:
        case Ping():
            return {"type": "ping"}, b""
        case Pong():
            return {"type": "pong"}, b""
        case FindNode(target_id):
            return {"type": "find_node"}, target_id
        case FoundNodes(contacts):
            return {"type": "found_nodes", "contacts": _packed_contacts(contacts)}, b""
        case FindRecords(key, known):
            return {"type": "find_records"}, b"".join((key, *known))
        case FoundRecords(records, has_more, contacts):
            header = {"type": "found_records", "more": has_more, "contacts": _packed_contacts(contacts)}
            return header, b"".join(record.encode() for record in records)
        case Store(records):
            return {"type": "store"}, b"".join(record.encode() for record in records)
        case Stored(refusals):
            return {
                "type": "stored",
                "refusals": ["" if refusal is None else refusal.value for refusal in refusals],
            }, b""
        case Failure(text):
            return {"type": "failure", "message": text[:MAX_ADDRESS_LETTERS]}, b""
    assert_never(message)


def _packed_contacts(contacts: Sequence[Contact]) -> list[list[Any]]:
    return [[contact.peer_id, list(contact.addresses)] for contact in contacts]


def decode_message(frame: Frame, peer_id: PeerId) -> Envelope:
    """What the peer said, checked; only its usable addresses and contacts are kept. Raises `MalformedMessage`."""
    fields = Fields(frame.header, "a DHT message", peer_id)
    message = _unpacked(fields.text("type"), fields, frame.body)
    addresses = fields.texts("from", MAX_CONTACT_ADDRESSES, MAX_ADDRESS_LETTERS)
    return Envelope(message, usable_addresses(peer_id, addresses))


def _unpacked(kind: str, fields: Fields, body: memoryview) -> Request | Reply:
    match kind:
        case "ping":
            return Ping()
        case "pong":
            return Pong()
        case "find_node":
            if len(body) != ID_BYTES:
                fields.refuse(f"an id of {ID_BYTES} bytes, got {len(body)}")
            return FindNode(bytes(body))
        case "found_nodes":
            return FoundNodes(_contacts(fields))
        case "find_records":
            return _find_records(fields, bytes(body))
        case "found_records":
            return FoundRecords(_records(fields, body), fields.boolean("more"), _contacts(fields))
        case "store":
            records = _records(fields, body)
            if len(records) > MAX_RECORDS_PER_STORE:
                fields.refuse(f"at most {MAX_RECORDS_PER_STORE} records to store, got {len(records)}")
            return Store(records)
        case "stored":
            return Stored(_refusals(fields))
        case "failure":
            return Failure(fields.text("message"))
    raise UnknownMessage(f"{fields.peer_id} sent a DHT message of unknown type {kind[:40]!r}", fields.peer_id)


def _find_records(fields: Fields, body: bytes) -> FindRecords:
    key, digests = body[:KEY_BYTES], body[KEY_BYTES:]
    if (
        len(key) != KEY_BYTES
        or len(digests) % SHORT_DIGEST_BYTES
        or len(digests) > MAX_KNOWN_DIGESTS * SHORT_DIGEST_BYTES
    ):
        wanted = f"a key of {KEY_BYTES} bytes and at most {MAX_KNOWN_DIGESTS} digests of {SHORT_DIGEST_BYTES}"
        fields.refuse(f"{wanted}, got {len(body)} bytes")
    starts = range(0, len(digests), SHORT_DIGEST_BYTES)
    return FindRecords(key, frozenset(digests[start : start + SHORT_DIGEST_BYTES] for start in starts))


def _records(fields: Fields, body: memoryview) -> tuple[SignedRecord, ...]:
    try:
        return tuple(decode_records(body))
    except ValueError as error:
        raise MalformedMessage(f"{fields.peer_id} sent {error}", fields.peer_id) from error


def _contacts(fields: Fields) -> tuple[Contact, ...]:
    contacts = (_contact(fields, item) for item in fields.items("contacts", MAX_CONTACTS))
    return tuple(contact for contact in contacts if contact.addresses)


def _contact(fields: Fields, item: object) -> Contact:
    match item:
        case [str(peer_id), [*addresses]] if all(isinstance(each, str) for each in addresses) and is_peer_id(peer_id):
            return _usable_contact(PeerId(peer_id), tuple(addresses))
    fields.refuse("contacts to be pairs of a peer id and a list of addresses")


@lru_cache(maxsize=8192)
def _usable_contact(peer_id: PeerId, addresses: tuple[str, ...]) -> Contact:
    return Contact(peer_id, usable_addresses(peer_id, addresses))


def _refusals(fields: Fields) -> tuple[Refusal | None, ...]:
    names: Mapping[str, Refusal] = {refusal.value: refusal for refusal in Refusal}
    texts = fields.texts("refusals", MAX_RECORDS_PER_STORE, MAX_ADDRESS_LETTERS)
    return tuple(names.get(text, Refusal.MALFORMED) if text else None for text in texts)
