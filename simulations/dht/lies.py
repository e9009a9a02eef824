"""Records that must never come out of a reader, and nodes that hand them to every reader they meet."""

from dataclasses import replace
from random import Random

from p2pswarm.core.clock import Clock
from p2pswarm.core.ids import PeerId
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.contact import Contact, closest, key_id_of
from p2pswarm.dht.incoming import IncomingStreams
from p2pswarm.dht.messages import (
    DHT_PROTOCOL,
    Envelope,
    Failure,
    FindNode,
    FindRecords,
    FoundNodes,
    FoundRecords,
    Ping,
    Pong,
    Reply,
    Store,
    Stored,
)
from p2pswarm.dht.record import MAX_VALUE_BYTES, SignedRecord, make_record
from p2pswarm.net.identity import Identity
from p2pswarm.testing.dht_world import DhtMember

TEN_YEARS_S = 10 * 365 * 86400.0


def bad_records(honest: SignedRecord, older: SignedRecord, random: Random, clock: Clock) -> dict[SignedRecord, str]:
    """Bad records under the key of `honest`, by kind; `older` is an earlier one by the same owner, still unexpired."""
    rogue = Identity.generate(random.randbytes(32))
    now_unix_s, key, sequence = clock.unix_time_s(), honest.key, honest.sequence + 1
    signed_by_rogue = make_record(rogue, key, b"not the owner's", sequence, now_unix_s + 60)
    return {
        older: "replayed",
        replace(honest, value=b"changed on the way", sequence=sequence): "forged",
        replace(signed_by_rogue, owner=honest.owner): "forged",
        replace(honest, expires_unix_ms=honest.expires_unix_ms + 60_000, sequence=sequence): "forged",
        make_record(rogue, key, b"x" * (MAX_VALUE_BYTES + 1), sequence, now_unix_s + 60): "oversized",
        make_record(rogue, key, b"expired", sequence, now_unix_s - 1): "expired",
        make_record(rogue, key, b"for ever", sequence, now_unix_s + TEN_YEARS_S): "too long lived",
        make_record(rogue, random.randbytes(32), b"elsewhere", sequence, now_unix_s + 60): "of another key",
    }


class Liar:
    """Takes over what a member answers to others: true contacts, bad records, and stores nothing."""

    def __init__(self, member: DhtMember, everybody: list[Contact], lies: dict[bytes, list[SignedRecord]]) -> None:
        self._addresses = member.network.addresses
        self._everybody = everybody
        self._lies = lies
        self.num_lies = 0
        member.network.serve(DHT_PROTOCOL, IncomingStreams(self._answer, DhtConfig()).handle)

    async def _answer(self, peer_id: PeerId, envelope: Envelope) -> Envelope:
        return Envelope(self._reply(envelope), self._addresses)

    def _reply(self, envelope: Envelope) -> Reply:
        match envelope.message:
            case Ping():
                return Pong()
            case FindNode(target_id):
                return FoundNodes(self._closest(target_id))
            case FindRecords(key):
                lies = self._lies.get(key, [])
                self.num_lies += len(lies)
                return FoundRecords(tuple(lies), False, self._closest(key_id_of(key)))
            case Store(records):
                return Stored((None,) * len(records))
        return Failure("no")

    def _closest(self, target_id: bytes) -> tuple[Contact, ...]:
        return tuple(closest(self._everybody, target_id, DhtConfig().k))
