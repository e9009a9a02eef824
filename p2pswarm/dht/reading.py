"""What one reader gathers about one key: the newest valid record of each owner, whoever sent it."""

from collections.abc import Iterable, Mapping

from p2pswarm.core.ids import PeerId
from p2pswarm.dht.messages import MAX_KNOWN_DIGESTS, FindRecords
from p2pswarm.dht.record import SHORT_DIGEST_BYTES, RecordChecker, SignedRecord, is_newer

MAX_OWNERS = 4096
"""Twice what an honest node holds for a key: where a liar sends more, the first to come stay."""


class Reading:
    """Starts from what is `known` already, which no holder then sends again."""

    def __init__(self, key: bytes, checker: RecordChecker, known: Iterable[SignedRecord] = ()) -> None:
        self._key = key
        self._checker = checker
        self._newest: dict[PeerId, SignedRecord] = {}
        self._seen: set[bytes] = set()
        for record in known:
            self._note(record)

    @property
    def num_seen(self) -> int:
        """Valid records so far, superseded ones too."""
        return len(self._seen)

    def request(self) -> FindRecords:
        """What to ask the next holder."""
        known = frozenset(self._seen) if len(self._seen) <= MAX_KNOWN_DIGESTS else frozenset()
        return FindRecords(self._key, known)

    def take(self, record: SignedRecord, now_unix_s: float) -> None:
        """Takes a record that a holder sent, if it is valid."""
        if record.key != self._key or self._checker.refusal(record, now_unix_s) is not None:
            return
        if record.owner in self._newest or len(self._newest) < MAX_OWNERS:
            self._note(record)

    def records(self, now_unix_s: float) -> Mapping[PeerId, SignedRecord]:
        """By owner, without those that have expired."""
        return {owner: record for owner, record in self._newest.items() if record.expires_unix_s > now_unix_s}

    def _note(self, record: SignedRecord) -> None:
        self._seen.add(record.digest()[:SHORT_DIGEST_BYTES])
        if is_newer(record, self._newest.get(record.owner)):
            self._newest[record.owner] = record
