"""What a serving node says to each request of a peer."""

from collections.abc import Sequence
from typing import assert_never

import trio

from p2pswarm.core.clock import Clock
from p2pswarm.core.ids import PeerId
from p2pswarm.dht.contact import Contact, key_id_of
from p2pswarm.dht.messages import (
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
)
from p2pswarm.dht.neighbours import Neighbours
from p2pswarm.dht.record import Refusal, SignedRecord
from p2pswarm.dht.store import RecordStore

RECORDS_BETWEEN_BREATHS = 8
"""Checking this many new signatures takes 1 ms; then other tasks have their turn."""


class Answering:
    """Answers from what this node knows and holds; whoever asks and serves gets into the table."""

    def __init__(self, neighbours: Neighbours, store: RecordStore, clock: Clock, k: int) -> None:
        self._neighbours = neighbours
        self._store = store
        self._clock = clock
        self._k = k

    async def answer(self, peer_id: PeerId, envelope: Envelope) -> Envelope:
        self._neighbours.heard_from(peer_id, envelope)
        reply = await self._reply(peer_id, envelope.message)
        return Envelope(reply, self._neighbours.own_addresses)

    async def _reply(self, peer_id: PeerId, message: Request | Reply) -> Reply:
        match message:
            case Ping():
                return Pong()
            case FindNode(target_id):
                return FoundNodes(self._closest(target_id, peer_id))
            case FindRecords(key, known):
                records, has_more = self._store.page(key, known, PAGE_BYTES, self._clock.unix_time_s())
                return FoundRecords(tuple(records), has_more, self._closest(key_id_of(key), peer_id))
            case Store(records):
                return Stored(await self._take(records))
            case Pong() | FoundNodes() | FoundRecords() | Stored() | Failure():
                return Failure("wanted a request, got an answer")
        assert_never(message)

    def _closest(self, target_id: bytes, asker: PeerId) -> tuple[Contact, ...]:
        contacts = self._neighbours.table.closest(target_id, self._k + 1)
        return tuple(contact for contact in contacts if contact.peer_id != asker)[: self._k]

    async def _take(self, records: Sequence[SignedRecord]) -> tuple[Refusal | None, ...]:
        refusals = []
        for index, record in enumerate(records):
            if index % RECORDS_BETWEEN_BREATHS == RECORDS_BETWEEN_BREATHS - 1:
                await trio.lowlevel.checkpoint()
            refusals.append(self._store.put(record, self._clock.unix_time_s()))
        return tuple(refusals)
