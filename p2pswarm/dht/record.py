"""A record: what one owner says under one key until it expires, signed, so that it may pass through any hands.

A key holds at most one record per owner; of two by the same owner the one with the higher sequence number counts.
Storers and readers apply the very same checks (`RecordChecker`). Knows nothing of nodes or streams; where records are
kept is `dht/store.py`.

What is signed, in big-endian order: `RECORD_DOMAIN`, the key, the owner's peer id (u16 length, ASCII), the sequence
number (u64), the expiry in milliseconds since 1970 UTC (u64), the value (u32 length, bytes).
"""

import hashlib
import struct
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from p2pswarm.core.ids import PeerId
from p2pswarm.dht.config import StoreLimits
from p2pswarm.net.identity import MAX_PEER_ID_LETTERS, verify_signature

RECORD_DOMAIN = b"p2pswarm/dht/record/1\0"
"""First in what is signed, so that a signature made for anything else never passes for a record."""
KEY_BYTES = 32
"""A key is a sha256."""
SIGNATURE_BYTES = 64
MAX_VALUE_BYTES = 8192
"""A ServerInfo with eight addresses and forty measured links takes 4 KiB."""
MAX_UINT64 = 2**64 - 1
SHORT_DIGEST_BYTES = 8
"""Enough to tell a reader's few thousand records apart; a clash would only hide one record until its next renewal."""

_OWNER_LENGTH = struct.Struct(">H")
_NUMBERS = struct.Struct(">QQI")
_FIXED_BYTES = KEY_BYTES + _OWNER_LENGTH.size + _NUMBERS.size + SIGNATURE_BYTES


@dataclass(frozen=True, slots=True)
class SignedRecord:
    """Fields as they came; nothing is known to be true until a `RecordChecker` says so."""

    key: bytes
    owner: PeerId
    sequence: int
    expires_unix_ms: int
    value: bytes
    signature: bytes

    @property
    def expires_unix_s(self) -> float:
        return self.expires_unix_ms / 1000

    @property
    def size_bytes(self) -> int:
        """Its length as it travels."""
        return _FIXED_BYTES + len(self.owner) + len(self.value)

    def signed_bytes(self) -> bytes:
        return signed_bytes(self.key, self.owner, self.sequence, self.expires_unix_ms, self.value)

    def encode(self) -> bytes:
        """As it travels: what is signed, less the domain, then the signature. `decode_records` reads it back."""
        return self.signed_bytes()[len(RECORD_DOMAIN) :] + self.signature

    def digest(self) -> bytes:
        """A sha256 over everything, the signature too."""
        return hashlib.sha256(self.signed_bytes() + self.signature).digest()


class Signer(Protocol):
    """Whoever has a key: an `Identity`, a `Network`."""

    @property
    def peer_id(self) -> PeerId: ...

    def sign(self, data: bytes) -> bytes: ...


class Refusal(Enum):
    """Why a record is not taken."""

    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    EXPIRED = "expired"
    TOO_LONG_LIVED = "too_long_lived"
    BAD_SIGNATURE = "bad_signature"
    OLDER = "older"
    """A record with a higher sequence number is held."""
    OWNER_FULL = "owner_full"
    KEY_FULL = "key_full"
    STORE_FULL = "store_full"


def signed_bytes(key: bytes, owner: PeerId, sequence: int, expires_unix_ms: int, value: bytes) -> bytes:
    """The bytes that a record's signature covers; the numbers must fit in 64 bits."""
    letters = owner.encode()
    return b"".join(
        (
            RECORD_DOMAIN,
            key,
            _OWNER_LENGTH.pack(len(letters)),
            letters,
            _NUMBERS.pack(sequence, expires_unix_ms, len(value)),
            value,
        )
    )


def make_record(signer: Signer, key: bytes, value: bytes, sequence: int, expires_unix_s: float) -> SignedRecord:
    """A record of the signer's own."""
    expires_unix_ms = round(expires_unix_s * 1000)
    signature = signer.sign(signed_bytes(key, signer.peer_id, sequence, expires_unix_ms, value))
    return SignedRecord(key, signer.peer_id, sequence, expires_unix_ms, value, signature)


def decode_records(data: memoryview) -> list[SignedRecord]:
    """The records that lie one behind the other in `data`, unchecked. Raises `ValueError` where they do not fill it."""
    records = []
    start = 0
    while start < len(data):
        record, start = _decode_record(data, start)
        records.append(record)
    return records


def _decode_record(data: memoryview, start: int) -> tuple[SignedRecord, int]:
    try:
        key, start = bytes(data[start : start + KEY_BYTES]), start + KEY_BYTES
        (owner_length,) = _OWNER_LENGTH.unpack_from(data, start)
        start += _OWNER_LENGTH.size
        owner = PeerId(str(data[start : start + owner_length], "ascii"))
        start += owner_length
        sequence, expires_unix_ms, value_length = _NUMBERS.unpack_from(data, start)
        start += _NUMBERS.size
    except struct.error as error:
        raise ValueError(f"a record that is cut short: {error}") from error
    value, start = bytes(data[start : start + value_length]), start + value_length
    signature, start = bytes(data[start : start + SIGNATURE_BYTES]), start + SIGNATURE_BYTES
    if start > len(data):
        raise ValueError("a record that is cut short")
    return SignedRecord(key, owner, sequence, expires_unix_ms, value, signature), start


def is_newer(record: SignedRecord, held: SignedRecord | None) -> bool:
    """Whether `record` takes the place of `held`, which has the same key and owner."""
    return held is None or record.sequence > held.sequence


class RecordChecker:
    """Checks records against a calendar; remembers which signatures held, since most records come many times."""

    def __init__(self, limits: StoreLimits, *, max_remembered: int = 16384) -> None:
        self._limits = limits
        self._max_remembered = max_remembered
        self._valid_digests: OrderedDict[bytes, None] = OrderedDict()

    def refusal(self, record: SignedRecord, now_unix_s: float) -> Refusal | None:
        """Why the record must not be held or believed; None where it may be. The cheap checks come first."""
        return self._shape_refusal(record) or self._time_refusal(record, now_unix_s) or self._signature_refusal(record)

    def _shape_refusal(self, record: SignedRecord) -> Refusal | None:
        if len(record.key) != KEY_BYTES or len(record.signature) != SIGNATURE_BYTES:
            return Refusal.MALFORMED
        if not 0 < len(record.owner) <= MAX_PEER_ID_LETTERS or not record.owner.isascii():
            return Refusal.MALFORMED
        if not (0 <= record.sequence <= MAX_UINT64 and 0 <= record.expires_unix_ms <= MAX_UINT64):
            return Refusal.MALFORMED
        return Refusal.TOO_LARGE if len(record.value) > MAX_VALUE_BYTES else None

    def _time_refusal(self, record: SignedRecord, now_unix_s: float) -> Refusal | None:
        if record.expires_unix_s <= now_unix_s:
            return Refusal.EXPIRED
        latest_s = now_unix_s + self._limits.max_lifetime_s + self._limits.clock_allowance_s
        return Refusal.TOO_LONG_LIVED if record.expires_unix_s > latest_s else None

    def _signature_refusal(self, record: SignedRecord) -> Refusal | None:
        digest = record.digest()
        if digest in self._valid_digests:
            self._valid_digests.move_to_end(digest)
            return None
        if not verify_signature(record.owner, record.signed_bytes(), record.signature):
            return Refusal.BAD_SIGNATURE
        self._valid_digests[digest] = None
        if len(self._valid_digests) > self._max_remembered:
            self._valid_digests.popitem(last=False)
        return None
