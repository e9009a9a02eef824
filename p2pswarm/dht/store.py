"""The records that a node keeps for others: checked on the way in and on the way out, and bounded in every direction.

What happens when something is full:

- what has expired goes first, always;
- an owner at its limit is refused more keys (it may still renew what it has);
- a key at its limit refuses new owners: whoever renews in time keeps his place, so a flood cannot push the
  established out;
- a full store gives up the keys farthest from this node, whose other holders are closer; a key farther than all is
  refused.

A record is kept until it expires even when its owner has withdrawn: the withdrawal is a record too, and keeps replays
of older ones out.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from p2pswarm.core.ids import PeerId
from p2pswarm.dht.config import StoreLimits
from p2pswarm.dht.contact import distance, key_id_of
from p2pswarm.dht.record import SHORT_DIGEST_BYTES, RecordChecker, Refusal, SignedRecord, is_newer


@dataclass(slots=True)
class _Usage:
    num_records: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Held:
    record: SignedRecord
    short_digest: bytes


class RecordStore:
    """Records by key and owner; the calendar comes with each call."""

    def __init__(self, node_id: bytes, checker: RecordChecker, limits: StoreLimits) -> None:
        self._node_id = node_id
        self._checker = checker
        self._limits = limits
        self._held: dict[bytes, dict[PeerId, _Held]] = {}
        self._by_owner: dict[PeerId, _Usage] = {}
        self._total = _Usage()

    @property
    def num_records(self) -> int:
        return self._total.num_records

    @property
    def size_bytes(self) -> int:
        return self._total.size_bytes

    def held_keys(self) -> list[bytes]:
        return list(self._held)

    def put(self, record: SignedRecord, now_unix_s: float) -> Refusal | None:
        """Takes the record, or says why not. One that is held already counts as taken."""
        refusal = self._checker.refusal(record, now_unix_s)
        if refusal is not None:
            return refusal
        held = self._held.get(record.key, {}).get(record.owner)
        if held is not None and not is_newer(record, held.record):
            return None if held.record == record else Refusal.OLDER
        if not self._has_room(record, held, now_unix_s):
            self.purge(now_unix_s)
        refusal = self._room_refusal(record, held)
        if refusal is None:
            self._insert(record)
        return refusal

    def get(self, key: bytes, now_unix_s: float) -> list[SignedRecord]:
        """All records of the key that have not expired."""
        return [held.record for held in self._living(key, now_unix_s)]

    def page(
        self, key: bytes, known: Collection[bytes], max_bytes: int, now_unix_s: float
    ) -> tuple[list[SignedRecord], bool]:
        """Records of the key that the reader does not know yet, as many as fit; and whether there are more.

        `known` holds short digests. A reader that asks again with what it got sees every record, however many there
        are.
        """
        records: list[SignedRecord] = []
        room_bytes = max_bytes
        for held in self._living(key, now_unix_s):
            if held.short_digest in known:
                continue
            room_bytes -= held.record.size_bytes
            if room_bytes < 0:
                return records, True
            records.append(held.record)
        return records, False

    def purge(self, now_unix_s: float) -> None:
        """Drops everything that has expired."""
        expired = [
            held.record
            for owners in self._held.values()
            for held in owners.values()
            if held.record.expires_unix_s <= now_unix_s
        ]
        for record in expired:
            self._remove(record)

    def _living(self, key: bytes, now_unix_s: float) -> Iterator[_Held]:
        for held in self._held.get(key, {}).values():
            if held.record.expires_unix_s > now_unix_s:
                yield held

    def _has_room(self, record: SignedRecord, held: _Held | None, now_unix_s: float) -> bool:
        return self._owner_or_key_refusal(record, held) is None and self._fits(record, held)

    def _room_refusal(self, record: SignedRecord, held: _Held | None) -> Refusal | None:
        refusal = self._owner_or_key_refusal(record, held)
        if refusal is not None:
            return refusal
        while not self._fits(record, held):
            farthest = max(self._held, key=self._distance, default=record.key)
            if self._distance(farthest) <= self._distance(record.key):
                return Refusal.STORE_FULL
            for other in list(self._held[farthest].values()):
                self._remove(other.record)
        return None

    def _owner_or_key_refusal(self, record: SignedRecord, held: _Held | None) -> Refusal | None:
        usage = self._by_owner.get(record.owner, _Usage())
        num_new, num_new_bytes = _growth(record, held)
        if usage.num_records + num_new > self._limits.max_records_per_owner:
            return Refusal.OWNER_FULL
        if usage.size_bytes + num_new_bytes > self._limits.max_bytes_per_owner:
            return Refusal.OWNER_FULL
        if len(self._held.get(record.key, {})) + num_new > self._limits.max_records_per_key:
            return Refusal.KEY_FULL
        return None

    def _fits(self, record: SignedRecord, held: _Held | None) -> bool:
        num_new, num_new_bytes = _growth(record, held)
        return (
            self._total.num_records + num_new <= self._limits.max_records
            and self._total.size_bytes + num_new_bytes <= self._limits.max_bytes
        )

    def _distance(self, key: bytes) -> int:
        return distance(key_id_of(key), self._node_id)

    def _insert(self, record: SignedRecord) -> None:
        held = self._held.get(record.key, {}).get(record.owner)
        if held is not None:
            self._remove(held.record)
        self._held.setdefault(record.key, {})[record.owner] = _Held(record, record.digest()[:SHORT_DIGEST_BYTES])
        for usage in (self._total, self._by_owner.setdefault(record.owner, _Usage())):
            usage.num_records += 1
            usage.size_bytes += record.size_bytes

    def _remove(self, record: SignedRecord) -> None:
        owners = self._held[record.key]
        del owners[record.owner]
        if not owners:
            del self._held[record.key]
        usage = self._by_owner[record.owner]
        for counted in (self._total, usage):
            counted.num_records -= 1
            counted.size_bytes -= record.size_bytes
        if not usage.num_records:
            del self._by_owner[record.owner]


def _growth(record: SignedRecord, held: _Held | None) -> tuple[int, int]:
    """By how many records and bytes the store grows when `record` takes the place of `held`."""
    if held is None:
        return 1, record.size_bytes
    return 0, record.size_bytes - held.record.size_bytes
