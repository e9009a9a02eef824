"""What a node does without being asked: looks around, replaces the dead, serves newcomers, comes back after an outage.

Every wait has jitter, so that nodes that started together do not work together.
"""

from collections.abc import Iterator
from random import Random

import trio

from p2pswarm.core.clock import Clock
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.contact import Contact, node_id_of
from p2pswarm.dht.entry import PointsOfEntry
from p2pswarm.dht.handover import keys_to_hand_over
from p2pswarm.dht.known_peers import KnownPeers
from p2pswarm.dht.messages import MAX_RECORDS_PER_STORE, PAGE_BYTES, Ping, Pong, Store, Stored
from p2pswarm.dht.neighbours import Neighbours
from p2pswarm.dht.record import SignedRecord
from p2pswarm.dht.store import RecordStore
from p2pswarm.dht.table import oldest_contact, random_id_in
from p2pswarm.dht.walk import Walks

JITTER = 0.2
"""Waits vary by this part, up and down."""
KEYS_BETWEEN_BREATHS = 256
"""Choosing among this many takes 3 ms; then other tasks have their turn."""


class Upkeep:
    """The periodic tasks of one node."""

    def __init__(
        self,
        neighbours: Neighbours,
        walks: Walks,
        entry: PointsOfEntry,
        known: KnownPeers,
        store: RecordStore,
        clock: Clock,
        random: Random,
        config: DhtConfig,
    ) -> None:
        self._neighbours = neighbours
        self._walks = walks
        self._entry = entry
        self._known = known
        self._store = store
        self._clock = clock
        self._random = random
        self._config = config

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_around)
            nursery.start_soon(self._recover)
            nursery.start_soon(self._keep_house)
            nursery.start_soon(self._serve_newcomers)

    async def make_ourselves_known(self) -> None:
        """Meets the nodes closest to us, then some everywhere else."""
        own_id = node_id_of(self._neighbours.own_peer_id)
        await self._walks.find_closest(own_id, self._config.k)
        for _ in range(self._config.join_refreshes):
            await self._refresh_stalest_bucket()

    async def _look_around(self) -> None:
        while True:
            await self._pause(self._config.refresh_period_s)
            await self._refresh_stalest_bucket()
            await self._try_lost_peer()

    async def _refresh_stalest_bucket(self) -> None:
        """Meets nodes in one part of the space, and sees whether its least recently seen contact still lives."""
        bucket = self._neighbours.table.stalest_bucket()
        bucket.refreshed_at_s = trio.current_time()
        oldest = oldest_contact(bucket)
        if oldest is not None:
            await self._neighbours.ask(oldest, Ping(), Pong)
        await self._walks.find_closest(random_id_in(bucket, self._random), self._config.alpha)

    async def _try_lost_peer(self) -> None:
        """Asks a point of entry that is not in the table: it may be in the other half of a swarm cut in two."""
        table = self._neighbours.table
        lost = [contact for contact in self._entry.contacts() if contact.peer_id not in table]
        if lost:
            await self._neighbours.greet(self._random.choice(lost))

    async def _recover(self) -> None:
        """Turns to the points of entry when the table is empty, less and less often while nobody answers."""
        pause_s = self._config.recover_first_s
        while True:
            await self._neighbours.wait_alone()
            await self._pause(pause_s)
            if self._neighbours.is_alone:
                pause_s = min(2 * pause_s, self._config.recover_most_s)
                self._neighbours.bad_peers.forget()
                if await self._entry.greet():
                    await self.make_ourselves_known()
            else:
                pause_s = self._config.recover_first_s

    async def _keep_house(self) -> None:
        while True:
            await self._pause(self._config.housekeeping_period_s)
            self._store.purge(self._clock.unix_time_s())
            self._neighbours.links.close_idle()
            self._known.save()

    async def _serve_newcomers(self) -> None:
        while True:
            await self._neighbours.wait_newcomer()
            await self._pause(self._config.handover_delay_s)
            for contact in self._neighbours.take_newcomers():
                await self._hand_over(contact)

    async def _hand_over(self, newcomer: Contact) -> None:
        held_keys = self._store.held_keys()
        if not held_keys:
            return
        own_id = node_id_of(self._neighbours.own_peer_id)
        others = list(self._neighbours.table.contacts())
        settled = self._neighbours.settled_contacts()
        keys: list[bytes] = []
        for start in range(0, len(held_keys), KEYS_BETWEEN_BREATHS):
            some_keys = held_keys[start : start + KEYS_BETWEEN_BREATHS]
            keys += keys_to_hand_over(some_keys, own_id, newcomer, others, settled, self._config.k)
            await trio.lowlevel.checkpoint()
        now_unix_s = self._clock.unix_time_s()
        records = [record for key in keys for record in self._store.get(key, now_unix_s)]
        for batch in _batches(records):
            if await self._neighbours.ask(newcomer, Store(tuple(batch)), Stored) is None:
                return

    async def _pause(self, about_s: float) -> None:
        await trio.sleep(about_s * self._random.uniform(1 - JITTER, 1 + JITTER))


def _batches(records: list[SignedRecord]) -> Iterator[list[SignedRecord]]:
    """The records in messages of the allowed size."""
    batch: list[SignedRecord] = []
    room_bytes = PAGE_BYTES
    for record in records:
        if batch and (len(batch) == MAX_RECORDS_PER_STORE or record.size_bytes > room_bytes):
            yield batch
            batch, room_bytes = [], PAGE_BYTES
        batch.append(record)
        room_bytes -= record.size_bytes
    if batch:
        yield batch
