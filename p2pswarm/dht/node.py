"""A node of the DHT: finds the nodes closest to a key, stores signed records there, and gets them back.

Theory of operation. Nodes and keys are points in a space of 160 bits; the distance of two is their exclusive or. Each
node knows many nodes near itself and some everywhere (`dht/table.py`), so that asking the closest known ones, again
and again, leads to the nodes closest to any point (`dht/lookup.py`). The k closest to a key hold its records
(`dht/store.py`); readers ask the closest few and merge what they say (`dht/reading.py`), the newest record of each
owner winning. Nothing is believed: a record is checked by whoever stores it and by whoever reads it
(`dht/record.py`). Answers are not cached on the way: a reader gets what holders say now.

Owners renew their records (`directory/announcer.py`); nodes hand records to newcomers, look around now and then, and
find their way back after an outage (`dht/upkeep.py`). `docs/protocol-dht.md` has the bytes.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import trio

from p2pswarm.core.clock import Clock
from p2pswarm.core.errors import ConfigError, NoPeersError
from p2pswarm.core.ids import PeerId
from p2pswarm.dht.answering import Answering
from p2pswarm.dht.background import Background
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.contact import Contact, distance, key_id_of, node_id_of
from p2pswarm.dht.entry import PointsOfEntry
from p2pswarm.dht.incoming import IncomingStreams
from p2pswarm.dht.known_peers import KnownPeers
from p2pswarm.dht.messages import DHT_PROTOCOL, FoundRecords, Store, Stored
from p2pswarm.dht.neighbours import Neighbours
from p2pswarm.dht.reading import Reading
from p2pswarm.dht.record import RecordChecker, Refusal, SignedRecord
from p2pswarm.dht.store import RecordStore
from p2pswarm.dht.upkeep import Upkeep
from p2pswarm.dht.walk import Walks
from p2pswarm.net.network import Network

MAX_PAGES_PER_HOLDER = 64
"""2048 records of the usual size fill 16 pages, of the largest 140; other holders send the rest."""
RECORDS_BETWEEN_BREATHS = 8
"""Checking this many new signatures takes 1 ms; then other tasks have their turn."""
MAX_TOLD = 3
"""Peers that do not answer, and reasons for it, in an error."""
CLOCK_HINT = " (`expired` or `too_long_lived`: does this machine's clock go wrong?)"
DEFAULT_CONFIG = DhtConfig()

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DhtStatistics:
    """A snapshot of one node."""

    num_contacts: int
    num_records: int
    num_record_bytes: int
    num_links: int
    """Streams we keep open to others."""
    num_incoming_streams: int
    num_asked: int
    """Requests of ours so far."""
    num_unanswered: int
    num_served: int
    """Requests of others so far."""


class DhtNode:
    """Works while `run` does."""

    def __init__(
        self,
        network: Network,
        clock: Clock,
        random: Random,
        config: DhtConfig = DEFAULT_CONFIG,
        known_peers_path: Path | None = None,
    ) -> None:
        self._network = network
        self._clock = clock
        self._config = config
        self._background = Background()
        self._checker = RecordChecker(config.store)
        self._known = KnownPeers(known_peers_path)
        self._store = RecordStore(node_id_of(network.peer_id), self._checker, config.store)
        self._neighbours = Neighbours(network, self._known, self._background, config)
        self._walks = Walks(self._neighbours, self._background, config)
        self._entry = PointsOfEntry(self._neighbours, self._known, self._background, config)
        self._incoming = IncomingStreams(Answering(self._neighbours, self._store, clock, config.k).answer, config)
        self._upkeep = Upkeep(
            self._neighbours, self._walks, self._entry, self._known, self._store, clock, random, config
        )

    @property
    def serves(self) -> bool:
        """Whether others may find us and store with us: only where they can dial us."""
        return self._neighbours.serves

    async def set_serving(self, serves: bool) -> None:
        """Has others find us, at our addresses of now, or find us no more; the nodes around us know when this returns.

        Who stops serving stays a client: it asks and stores with others, who forget it when they next hear from it.
        """
        self._neighbours.serves = serves and self._config.serve and bool(self._network.addresses)
        self._neighbours.forget_own_addresses()
        if not self._neighbours.is_alone:
            await self._upkeep.make_ourselves_known()

    def contacts(self) -> list[Contact]:
        """Serving nodes that answered, or asked us something, when last heard of."""
        return list(self._neighbours.table.contacts())

    @property
    def num_contacts(self) -> int:
        """Serving nodes that we know and that answered, or asked us something, when last heard of."""
        return len(self._neighbours.table)

    def known_contacts(self) -> list[Contact]:
        """Nodes that answered once, as remembered on disk: what a newcomer may be told of."""
        return self._known.contacts()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves others and keeps house, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._background.run)
            if self._config.serve:
                self._network.serve(DHT_PROTOCOL, self._incoming.handle)
            nursery.start_soon(self._upkeep.run)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._neighbours.links.close_all()
                self._known.save()

    async def bootstrap(self, addresses: Sequence[str] = (), *, makes_known: bool = True) -> None:
        """Joins the swarm that the peers at `addresses`, or those remembered from last time, belong to.

        Returns when one of them has answered and, where we serve, the nodes around us know us; at once when there is
        nobody to ask (a new swarm). Whenever all others are lost, these peers are turned to again. Raises
        `ConfigError` for an address that cannot be dialled, `NoPeersError` when nobody answers. Without `makes_known`
        only those peers hear of us until `set_serving`: for who does not know yet whether it can be dialled.
        """
        self._entry.give(addresses)
        contacts = self._entry.contacts()
        if not contacts:
            return
        if not await self._entry.greet():
            raise NoPeersError(_nobody_answers(contacts, self._entry.failures))
        if self.serves and makes_known:
            await self._upkeep.make_ourselves_known()

    async def put(self, record: SignedRecord) -> int:
        """Stores our own or anyone's record at the k nodes closest to its key; how many of them took it.

        Raises `ConfigError` for a record that nobody would take.
        """
        refusal = self._checker.refusal(record, self._clock.unix_time_s())
        if refusal is not None:
            raise ConfigError(f"nobody would store this record of {record.owner}: {refusal.value}")
        key_id = key_id_of(record.key)
        holders = await self._walks.find_closest(key_id, self._config.k)
        outcomes: list[Refusal | None] = []
        if self.serves and _is_among_closest(node_id_of(self._network.peer_id), key_id, holders, self._config.k):
            holders = holders[: self._config.k - 1]
            outcomes.append(self._store.put(record, self._clock.unix_time_s()))

        async def store_at(holder: Contact) -> None:
            answer = await self._neighbours.ask(holder, Store((record,)), Stored)
            if answer is not None:
                outcomes.extend(answer.refusals[:1])

        async with trio.open_nursery() as nursery:
            for holder in holders:
                nursery.start_soon(store_at, holder)
        _tell_if_refused(record, outcomes)
        return outcomes.count(None)

    async def get(self, key: bytes, known: Iterable[SignedRecord] = ()) -> Mapping[PeerId, SignedRecord]:
        """The newest valid record of each owner under the key.

        `known` are valid records the caller has from before: they count, and are not sent again.
        """
        reading = Reading(key, self._checker, known)
        for record in self._store.get(key, self._clock.unix_time_s()):
            reading.take(record, self._clock.unix_time_s())

        async def read_from(holder: Contact) -> Sequence[Contact] | None:
            return await self._read_from(holder, reading)

        await self._walks.run(key_id_of(key), self._config.read_quorum, self._config.read_window, read_from)
        return reading.records(self._clock.unix_time_s())

    def statistics(self) -> DhtStatistics:
        neighbours = self._neighbours
        return DhtStatistics(
            num_contacts=len(neighbours.table),
            num_records=self._store.num_records,
            num_record_bytes=self._store.size_bytes,
            num_links=neighbours.links.num_open,
            num_incoming_streams=self._incoming.num_open,
            num_asked=neighbours.num_asked,
            num_unanswered=neighbours.num_unanswered,
            num_served=self._incoming.num_served,
        )

    async def _read_from(self, holder: Contact, reading: Reading) -> Sequence[Contact] | None:
        """Takes all pages that the holder has; the contacts it named, None where it did not answer."""
        contacts: Sequence[Contact] = ()
        for _ in range(MAX_PAGES_PER_HOLDER):
            num_seen = reading.num_seen
            answer = await self._neighbours.ask(holder, reading.request(), FoundRecords)
            if answer is None:
                return None
            contacts = answer.contacts
            for index, record in enumerate(answer.records):
                if index % RECORDS_BETWEEN_BREATHS == RECORDS_BETWEEN_BREATHS - 1:
                    await trio.lowlevel.checkpoint()
                reading.take(record, self._clock.unix_time_s())
            if not answer.has_more or reading.num_seen == num_seen:
                break
        return self._neighbours.hear_of(contacts)


def _nobody_answers(contacts: Sequence[Contact], failures: Sequence[str]) -> str:
    some = ", ".join(contact.addresses[0] for contact in contacts[:MAX_TOLD])
    reasons = f" ({'; '.join(failures[:MAX_TOLD])})" if failures else ""
    return f"none of {len(contacts)} known peers answers: {some}{reasons}"


def _tell_if_refused(record: SignedRecord, outcomes: Sequence[Refusal | None]) -> None:
    if not outcomes or None in outcomes:
        return
    reasons = ", ".join(sorted({outcome.value for outcome in outcomes if outcome is not None}))
    logger.warning("all %d nodes refused a record of %s: %s%s", len(outcomes), record.owner, reasons, CLOCK_HINT)


def _is_among_closest(own_id: bytes, key_id: bytes, others: Sequence[Contact], k: int) -> bool:
    own_distance = distance(own_id, key_id)
    return sum(distance(node_id_of(other.peer_id), key_id) < own_distance for other in others) < k
