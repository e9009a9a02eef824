"""A swarm of DHT nodes, part of it dead, hung or lying, and what readers get out of it; all in simulated time.

The nodes are `p2pswarm.dht`'s own, over `MemoryNetwork`; nothing of their policy is written again here.
"""

import gc
import hashlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio
from trio.testing import MockClock

from p2pswarm.core.errors import NetworkError
from p2pswarm.core.ids import PeerId
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.contact import Contact, closest, key_id_of
from p2pswarm.dht.links import Links
from p2pswarm.dht.messages import Store
from p2pswarm.dht.record import SignedRecord, make_record
from p2pswarm.testing.dht_world import DhtMember, DhtWorld, open_dht_world
from p2pswarm.testing.memory_network import Link
from simulations.dht.lies import Liar, bad_records

LIFETIME_S = 600.0
SHORT_LIFETIME_S = 20.0
"""Of records that are stored in good faith and have expired when readers come."""
VALUE_BYTES = 600
"""A usual announcement."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated. Equal ones have the same nodes, records and fates; trio alone shuffles who moves first."""

    num_nodes: int = 500
    dead: float = 0.3
    """Part of the nodes that is killed, all at once, after the records were stored."""
    hung: float = 0.05
    """Part that is stopped, as SIGSTOP does it, at the same moment."""
    lying: float = 0.05
    """Part that lives, and answers readers with bad records."""
    num_keys: int = 10
    owners_per_key: int = 10
    num_lookups: int = 200
    latency_s: float = 0.025
    """One way: 50 ms there and back."""
    join_interval_s: float = 0.1
    lookup_interval_s: float = 0.1
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the readers saw, and what it took."""

    num_records: int
    num_expected: int
    """Live records that the lookups should have brought, all of them together."""
    num_missing: int
    bad_records: Counter[str]
    """Records that should never come out, by kind, each time one did."""
    num_lies: int
    """Bad records that were sent to readers, or to holders to store."""
    lookup_times_s: tuple[float, ...]
    requests_per_join: float
    contacts_per_node: float

    @property
    def median_lookup_s(self) -> float:
        return statistics.median(self.lookup_times_s)

    @property
    def slowest_lookup_s(self) -> float:
        return max(self.lookup_times_s)


@dataclass(slots=True)
class _Truth:
    """What there is to be found, and what must not be."""

    newest: defaultdict[bytes, dict[PeerId, SignedRecord]] = field(default_factory=lambda: defaultdict(dict))
    bad: dict[SignedRecord, str] = field(default_factory=dict)
    bad_found: Counter[str] = field(default_factory=Counter)
    num_expected: int = 0
    num_missing: int = 0
    lookup_times_s: list[float] = field(default_factory=list)

    async def look_up(self, reader: DhtMember, key: bytes) -> None:
        asked_at_s = trio.current_time()
        found = await reader.dht.get(key)
        self.lookup_times_s.append(trio.current_time() - asked_at_s)
        self.num_expected += len(self.newest[key])
        self.num_missing += sum(found.get(owner) != record for owner, record in self.newest[key].items())
        for record in found.values():
            if record in self.bad:
                self.bad_found[self.bad[record]] += 1
            elif self.newest[key].get(record.owner) != record:
                self.bad_found["never stored"] += 1


def simulate(scenario: Scenario) -> Outcome:
    """Runs the scenario: about a millisecond of real time for each simulated request."""
    with _rare_garbage_collection():
        return trio.run(_simulate, scenario, clock=MockClock(autojump_threshold=0))


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Hundreds of nodes are a million objects that live on: to look through them often took a third of the time."""
    thresholds = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


async def _simulate(scenario: Scenario) -> Outcome:
    async with open_dht_world(scenario.seed, Link(latency_s=scenario.latency_s)) as world:
        await _join_all(world, scenario)
        num_nodes = len(world.members)
        requests_per_join = sum(member.dht.statistics().num_asked for member in world.members) / num_nodes
        contacts_per_node = sum(member.dht.num_contacts for member in world.members) / num_nodes
        truth = _Truth()
        await _store_records(world, scenario, truth)
        readers, liars = _strike(world, scenario, truth)
        num_pushed = await _push_bad_records(world, readers, truth)
        async with trio.open_nursery() as nursery:
            for _ in range(scenario.num_lookups):
                nursery.start_soon(truth.look_up, world.random.choice(readers), world.random.choice(list(truth.newest)))
                await trio.sleep(scenario.lookup_interval_s)
        return Outcome(
            num_records=sum(map(len, truth.newest.values())),
            num_expected=truth.num_expected,
            num_missing=truth.num_missing,
            bad_records=truth.bad_found,
            num_lies=num_pushed + sum(liar.num_lies for liar in liars),
            lookup_times_s=tuple(truth.lookup_times_s),
            requests_per_join=requests_per_join,
            contacts_per_node=contacts_per_node,
        )


async def _join_all(world: DhtWorld, scenario: Scenario) -> None:
    await world.add()
    async with trio.open_nursery() as nursery:
        for _ in range(scenario.num_nodes - 1):
            nursery.start_soon(world.add, [world.random.choice(world.members)])
            await trio.sleep(scenario.join_interval_s)


async def _store_records(world: DhtWorld, scenario: Scenario, truth: _Truth) -> None:
    """Each owner stores a record and then a newer one; one more owner per key stores one that soon expires."""
    async with trio.open_nursery() as nursery:
        for index in range(scenario.num_keys):
            key = hashlib.sha256(b"key %d" % index).digest()
            *owners, forgetful = world.random.sample(world.members, scenario.owners_per_key + 1)
            for owner in owners:
                older, newest = _record(world, owner, key, 1), _record(world, owner, key, 2)
                nursery.start_soon(_put_both, owner, older, newest)
                truth.newest[key][newest.owner] = newest
                truth.bad |= bad_records(newest, older, world.random, world.clock)
            expiring = _record(world, forgetful, key, 1, SHORT_LIFETIME_S)
            nursery.start_soon(forgetful.dht.put, expiring)
            truth.bad[expiring] = "expired"
    await trio.sleep(SHORT_LIFETIME_S)


async def _put_both(owner: DhtMember, older: SignedRecord, newest: SignedRecord) -> None:
    await owner.dht.put(older)
    await owner.dht.put(newest)


def _record(
    world: DhtWorld, owner: DhtMember, key: bytes, sequence: int, lifetime_s: float = LIFETIME_S
) -> SignedRecord:
    value = world.random.randbytes(VALUE_BYTES)
    return make_record(owner.network, key, value, sequence, world.clock.unix_time_s() + lifetime_s)


def _strike(world: DhtWorld, scenario: Scenario, truth: _Truth) -> tuple[list[DhtMember], list[Liar]]:
    """Kills, hangs and corrupts members; returns the honest rest and the liars."""
    members = world.random.sample(world.members, len(world.members))
    num_dead, num_hung, num_lying = (
        round(part * len(members)) for part in (scenario.dead, scenario.hung, scenario.lying)
    )
    for member in members[:num_dead]:
        world.memory.kill(member.network.peer_id)
    for member in members[num_dead : num_dead + num_hung]:
        world.memory.hang(member.network.peer_id)
    living = members[num_dead + num_hung :]
    lies: defaultdict[bytes, list[SignedRecord]] = defaultdict(list)
    for record in truth.bad:
        for key in truth.newest:
            if record.key == key or truth.bad[record] == "of another key":
                lies[key].append(record)
    everybody = [_contact(member) for member in world.members]
    return living[num_lying:], [Liar(member, everybody, lies) for member in living[:num_lying]]


async def _push_bad_records(world: DhtWorld, readers: list[DhtMember], truth: _Truth) -> int:
    """A stranger asks the closest holders to store the bad records; how many he sent."""
    contacts = [_contact(member) for member in readers]
    num_sent = 0
    async with world.memory.node(world.num_identities + 1, listens=False) as stranger:
        links = Links(stranger, DhtConfig())
        for record in truth.bad:
            holder = closest(contacts, key_id_of(record.key), 1)[0]
            stranger.add_addresses(holder.peer_id, holder.addresses)
            try:
                await links.ask(holder.peer_id, Store((record,)), (), timeout_s=2.0)
            except NetworkError:
                continue
            num_sent += 1
        links.close_all()
    return num_sent


def _contact(member: DhtMember) -> Contact:
    return Contact(member.network.peer_id, member.network.addresses)
