"""Whole nodes over a simulated network: storing, finding, joining, dying, hanging, coming back."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio

from p2pswarm.core.errors import ConfigError, NoPeersError, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.contact import Contact
from p2pswarm.dht.incoming import IncomingStreams
from p2pswarm.dht.links import Links
from p2pswarm.dht.messages import (
    DHT_PROTOCOL,
    Envelope,
    FindNode,
    FindRecords,
    FoundNodes,
    FoundRecords,
    Ping,
    Pong,
    Store,
    Stored,
)
from p2pswarm.dht.node import DhtNode
from p2pswarm.dht.record import KEY_BYTES, Refusal, SignedRecord, make_record
from p2pswarm.testing.dht_world import DhtMember, DhtWorld, open_dht_world
from p2pswarm.testing.simulated_clock import SimulatedClock

KEY = bytes(range(KEY_BYTES))


@asynccontextmanager
async def world_of(count: int, config: DhtConfig | None = None) -> AsyncIterator[DhtWorld]:
    """A world whose `count` members joined by way of the first."""
    async with open_dht_world(seed=count) as world:
        for _ in range(count):
            await world.add(world.members[:1], config=config or DhtConfig())
        yield world


def record_of(
    world: DhtWorld,
    owner: DhtMember,
    sequence: int = 1,
    lifetime_s: float = 300,
    value: bytes = b"value",
    key: bytes = KEY,
) -> SignedRecord:
    return make_record(owner.network, key, value, sequence, world.clock.unix_time_s() + lifetime_s)


def contact_of(member: DhtMember) -> Contact:
    return Contact(member.network.peer_id, member.network.addresses)


async def test_a_lone_node_keeps_its_record_and_others_find_it_later(autojump_clock):
    async with world_of(1) as world:
        first = world.members[0]
        record = record_of(world, first)
        assert await first.dht.put(record) == 1
        second = await world.add([first])
        assert await second.dht.get(KEY) == {first.network.peer_id: record}


async def test_everyone_finds_the_records_of_all_owners(autojump_clock):
    async with world_of(12) as world:
        records = {owner.network.peer_id: record_of(world, owner) for owner in world.members[:5]}
        for owner in world.members[:5]:
            assert await owner.dht.put(records[owner.network.peer_id]) == 12
        for reader in world.members:
            assert await reader.dht.get(KEY) == records


async def test_a_key_nobody_wrote_to_is_empty(autojump_clock):
    async with world_of(3) as world:
        assert await world.members[1].dht.get(KEY) == {}


async def test_readers_see_the_newest_record_even_where_some_holders_missed_it(autojump_clock):
    async with world_of(12) as world:
        owner = world.members[0]
        await owner.dht.put(record_of(world, owner, sequence=1))
        missing = {member.network.peer_id for member in world.members[6:]}
        world.memory.partition([missing])
        newest = record_of(world, owner, sequence=2)
        await owner.dht.put(newest)
        world.memory.heal()
        await trio.sleep(60)
        for reader in world.members:
            assert await reader.dht.get(KEY) == {owner.network.peer_id: newest}


async def test_a_record_vanishes_when_it_expires(autojump_clock):
    async with world_of(4) as world:
        owner, reader = world.members[:2]
        await owner.dht.put(record_of(world, owner, lifetime_s=100))
        await trio.sleep(95)
        assert await reader.dht.get(KEY)
        await trio.sleep(5)
        assert await reader.dht.get(KEY) == {}
        await trio.sleep(30)
        assert all(member.dht.statistics().num_records == 0 for member in world.members)


async def test_what_the_reader_knows_is_kept_but_never_beyond_its_expiry(autojump_clock):
    async with world_of(3) as world:
        stranger = await world.add(world.members[:1], listens=False)
        known = record_of(world, stranger, lifetime_s=50)
        assert await world.members[0].dht.get(KEY, [known]) == {stranger.network.peer_id: known}
        await trio.sleep(50)
        assert await world.members[0].dht.get(KEY, [known]) == {}


async def test_nobody_stores_what_nobody_would_take(autojump_clock):
    async with world_of(2) as world:
        owner = world.members[0]
        with pytest.raises(ConfigError, match="bad_signature"):
            await owner.dht.put(replace(record_of(world, owner), value=b"changed"))
        with pytest.raises(ConfigError, match="expired"):
            await owner.dht.put(record_of(world, owner, lifetime_s=-1))


async def test_holders_refuse_bad_records_one_by_one_and_keep_the_good(autojump_clock):
    async with world_of(2) as world:
        holder, owner = world.members
        good, old = record_of(world, owner, sequence=2), record_of(world, owner, sequence=1)
        expired = record_of(world, owner, sequence=3, lifetime_s=-1)
        forged = replace(good, value=b"forged", sequence=9)
        async with world.memory.node(99, listens=False) as stranger:
            stranger.add_addresses(holder.network.peer_id, holder.network.addresses)
            links = Links(stranger, DhtConfig())
            answer = await links.ask(holder.network.peer_id, Store((forged, good, expired, old)), (), timeout_s=2.0)
        assert answer.message == Stored((Refusal.BAD_SIGNATURE, None, Refusal.EXPIRED, Refusal.OLDER))
        assert await holder.dht.get(KEY) == {owner.network.peer_id: good}


async def test_an_owner_whose_clock_is_wrong_is_told_why_nobody_takes_its_record(
    autojump_clock, caplog: pytest.LogCaptureFixture
):
    async with world_of(3) as world, world.memory.node(60, listens=False) as network, trio.open_nursery() as nursery:
        dht = DhtNode(network, SimulatedClock(skew_s=-600), Random(1))
        await nursery.start(dht.run)
        await dht.bootstrap(world.members[0].network.addresses)
        late = make_record(network, KEY, b"value", 1, world.clock.unix_time_s() - 500)
        assert await dht.put(late) == 0
        assert "all 3 nodes refused a record" in caplog.text
        assert "expired" in caplog.text
        nursery.cancel_scope.cancel()


async def test_holders_that_send_the_same_page_at_once_do_not_keep_the_rest_from_the_reader(autojump_clock):
    async with world_of(4) as world:
        for number in range(100, 140):
            async with world.memory.node(number, listens=False) as owner:
                record = make_record(owner, KEY, bytes(8000), 1, world.clock.unix_time_s() + 300)
                assert await world.members[0].dht.put(record) == 4
        client = await world.add(world.members, config=DhtConfig(serve=False))
        assert len(await client.dht.get(KEY)) == 40


async def test_a_client_is_never_in_the_tables_of_others_nor_stores_for_them(autojump_clock):
    async with world_of(3) as world:
        client = await world.add(world.members[:1], config=DhtConfig(serve=False))
        silent = await world.add(world.members[:1], listens=False)
        record = record_of(world, client)
        assert await client.dht.put(record) == 3
        assert await silent.dht.get(KEY) == {client.network.peer_id: record}
        assert not client.dht.serves
        assert not silent.dht.serves
        for member in world.members[:3]:
            assert member.dht.num_contacts == 2
        assert client.dht.statistics().num_records == silent.dht.statistics().num_records == 0


async def test_joining_needs_any_one_living_peer(autojump_clock):
    async with world_of(3) as world:
        world.memory.kill(world.members[0].network.peer_id)
        world.memory.hang(world.members[1].network.peer_id)
        began_s = trio.current_time()
        late = await world.add(world.members)
        assert late.dht.num_contacts >= 1
        assert trio.current_time() - began_s < 3


async def test_joining_by_way_of_the_dead_says_so(autojump_clock):
    async with world_of(1) as world:
        dead = world.members[0]
        world.memory.kill(dead.network.peer_id)
        with pytest.raises(NoPeersError, match=dead.network.peer_id):
            await world.add([dead])


async def test_a_malformed_peer_address_is_refused(autojump_clock):
    async with world_of(1) as world:
        for address in ("/ip4/10.0.0.1/tcp/4001", "nonsense", f"/ip4/0.0.0.0/tcp/1/p2p/{'1' * 52}"):
            with pytest.raises(ConfigError):
                await world.members[0].dht.bootstrap([address])


async def test_a_hung_peer_costs_a_lookup_at_most_two_seconds_and_then_nothing(autojump_clock):
    async with world_of(6) as world:
        owner, reader = world.members[:2]
        await owner.dht.put(record_of(world, owner))
        for member in world.members[3:]:
            world.memory.hang(member.network.peer_id)
        times_s = []
        for _ in range(2):
            began_s = trio.current_time()
            assert await reader.dht.get(KEY)
            times_s.append(trio.current_time() - began_s)
        assert times_s[0] <= 2.5
        assert times_s[1] <= 0.5


async def test_the_dead_leave_the_table(autojump_clock):
    async with world_of(5) as world:
        reader, *others = world.members
        for member in others[2:]:
            world.memory.kill(member.network.peer_id)
        await reader.dht.get(KEY)
        assert reader.dht.num_contacts == 2


async def test_a_newcomer_is_handed_the_records_it_should_hold(autojump_clock):
    async with world_of(3) as world:
        owner = world.members[0]
        await owner.dht.put(record_of(world, owner))
        newcomer = await world.add(world.members[:1])
        await trio.sleep(3)
        assert newcomer.dht.statistics().num_records == 1
        for member in world.members[:3]:
            world.memory.kill(member.network.peer_id)
        assert list(await newcomer.dht.get(KEY)) == [owner.network.peer_id]


async def test_records_stored_while_thirty_nodes_join_at_once_are_found_by_all(autojump_clock):
    async with open_dht_world(seed=30) as world:
        first = await world.add()
        owners = set()
        async with trio.open_nursery() as nursery:
            for index in range(29):
                nursery.start_soon(world.add, [first])
                await trio.sleep(0.05)
                if index % 6 == 0:
                    owner = world.members[-1]
                    owners.add(owner.network.peer_id)
                    nursery.start_soon(owner.dht.put, record_of(world, owner))
        await trio.sleep(5)
        for reader in world.members:
            assert set(await reader.dht.get(KEY)) == owners


async def test_a_node_finds_the_swarm_again_by_itself_after_an_outage_of_its_own(autojump_clock):
    async with world_of(5) as world:
        cut_off = world.members[4]
        world.memory.partition([{cut_off.network.peer_id}])
        await trio.sleep(900)
        assert cut_off.dht.num_contacts == 0
        world.memory.heal()
        await trio.sleep(60)
        assert cut_off.dht.num_contacts >= 1
        record = record_of(world, world.members[0])
        await world.members[0].dht.put(record)
        assert list(await cut_off.dht.get(KEY)) == [world.members[0].network.peer_id]


async def test_two_halves_of_a_swarm_find_each_other_again(autojump_clock):
    async with world_of(8) as world:
        half = [member.network.peer_id for member in world.members[:4]]
        world.memory.partition([half])
        await trio.sleep(1800)
        world.memory.heal()
        await trio.sleep(600)
        owner = world.members[0]
        await owner.dht.put(record_of(world, owner))
        for reader in world.members:
            assert list(await reader.dht.get(KEY)) == [owner.network.peer_id]


async def test_a_restarted_node_finds_the_swarm_from_its_file_of_known_peers(autojump_clock, tmp_path: Path):
    async with world_of(3) as world:
        before = await world.add(world.members[:1], identity=77, known_peers_path=tmp_path / "peers.json")
        await trio.sleep(1)
        before.scope.cancel()
        await trio.sleep(1)
        world.memory.kill(world.members[0].network.peer_id)
        after = await world.add(identity=77, known_peers_path=tmp_path / "peers.json")
        assert after.dht.num_contacts >= 1


async def test_more_records_than_fit_one_answer_are_read_in_pages(autojump_clock):
    async with world_of(2) as world:
        holder = world.members[0]
        for number in range(100, 130):
            async with world.memory.node(number, listens=False) as owner:
                record = make_record(owner, KEY, bytes(8000), 1, world.clock.unix_time_s() + 300)
                assert await holder.dht.put(record) == 2
        client = await world.add([holder], config=DhtConfig(serve=False))
        assert len(await client.dht.get(KEY)) == 30


async def test_a_liar_among_the_holders_brings_nothing_bad_out(autojump_clock):
    async with world_of(4) as world:
        owner, reader, liar, _ = world.members
        older, newest = (record_of(world, owner, sequence) for sequence in (1, 2))
        await owner.dht.put(newest)
        lies = (
            older,
            replace(newest, value=b"forged", sequence=9),
            record_of(world, liar, lifetime_s=-1),
            record_of(world, liar, value=bytes(9000)),
            record_of(world, liar, lifetime_s=1e6),
            record_of(world, liar, key=bytes(KEY_BYTES)),
        )
        await serve_answers(liar, [FoundRecords(lies, True, ())])
        assert await reader.dht.get(KEY) == {owner.network.peer_id: newest}


@pytest.mark.parametrize("answer", [Pong(), Stored(()), FoundRecords((), False, ()), Ping()])
async def test_a_peer_that_answers_something_else_is_left_out(autojump_clock, answer):
    async with world_of(3) as world:
        reader, odd, honest = world.members
        await serve_answers(odd, [answer])
        assert await reader.dht.put(record_of(world, reader)) == 2
        assert reader.dht.num_contacts == 1
        assert list(await honest.dht.get(KEY)) == [reader.network.peer_id]


async def test_contacts_that_lead_nowhere_do_not_stop_a_lookup(autojump_clock):
    async with world_of(4) as world:
        owner, reader, liar = world.members[:3]
        await owner.dht.put(record_of(world, owner))
        nobodies = []
        for number in range(500, 520):
            async with world.memory.node(number) as gone:
                nobodies.append(Contact(gone.peer_id, gone.addresses))
        await serve_answers(liar, [FoundRecords((), False, tuple(nobodies))])
        with trio.fail_after(10):
            assert list(await reader.dht.get(KEY)) == [owner.network.peer_id]


async def serve_answers(member: DhtMember, answers: Sequence[object]) -> None:
    """Makes the member answer every request with the last of these."""

    async def answer(peer_id: PeerId, envelope: Envelope) -> Envelope:
        return Envelope(answers[-1], member.network.addresses)

    member.network.serve(DHT_PROTOCOL, IncomingStreams(answer, DhtConfig()).handle)
    for peer_id in member.network.connected_peers:
        await member.network.disconnect(peer_id)
    await trio.sleep(1)


async def test_a_stream_goes_on_after_a_request_that_makes_no_sense(autojump_clock):
    async with world_of(1) as world, world.memory.node(50, listens=False) as stranger:
        server = world.members[0].network
        await stranger.connect(server.addresses[0])
        links = Links(stranger, DhtConfig())
        with pytest.raises(ProtocolViolation, match="20 bytes"):
            await links.ask(server.peer_id, FindNode(b"short"), (), timeout_s=2.0)
        with pytest.raises(ProtocolViolation, match="wanted a request"):
            await links.ask(server.peer_id, Pong(), (), timeout_s=2.0)
        assert isinstance((await links.ask(server.peer_id, Ping(), (), timeout_s=2.0)).message, Pong)
        assert isinstance((await links.ask(server.peer_id, FindRecords(KEY), (), timeout_s=2.0)).message, FoundRecords)
        assert isinstance((await links.ask(server.peer_id, FindNode(KEY[:20]), (), timeout_s=2.0)).message, FoundNodes)


async def test_streams_of_one_peer_are_limited_and_idle_ones_closed(autojump_clock):
    config = DhtConfig(max_incoming_streams_per_peer=2, incoming_idle_s=50)
    async with world_of(1, config) as world, world.memory.node(50, listens=False) as stranger:
        server = world.members[0]
        await stranger.connect(server.network.addresses[0])
        streams = [await stranger.open_stream(server.network.peer_id, DHT_PROTOCOL) for _ in range(3)]
        assert await streams[2].read() == b""
        assert server.dht.statistics().num_incoming_streams == 2
        await trio.sleep(51)
        assert server.dht.statistics().num_incoming_streams == 0


async def test_at_the_limit_of_all_streams_the_longest_idle_one_makes_room(autojump_clock):
    config = DhtConfig(max_incoming_streams=2)
    async with world_of(1, config) as world:
        server = world.members[0].network
        async with trio.open_nursery() as nursery:
            for number in (50, 51, 52):
                await nursery.start(_ask_once_and_stay, world, number, server)
            await trio.sleep(1)
            assert world.members[0].dht.statistics().num_incoming_streams == 2
            nursery.cancel_scope.cancel()


async def _ask_once_and_stay(world: DhtWorld, number: int, server, task_status) -> None:
    async with world.memory.node(number, listens=False) as stranger:
        await stranger.connect(server.addresses[0])
        links = Links(stranger, DhtConfig())
        assert isinstance((await links.ask(server.peer_id, Ping(), (), timeout_s=2.0)).message, Pong)
        task_status.started()
        await trio.sleep_forever()


async def test_a_peer_that_asks_too_fast_has_to_wait(autojump_clock):
    config = DhtConfig(requests_per_s_per_peer=10, request_burst_per_peer=5)
    async with world_of(1, config) as world, world.memory.node(50, listens=False) as stranger:
        server = world.members[0].network
        await stranger.connect(server.addresses[0])
        links = Links(stranger, DhtConfig())
        began_s = trio.current_time()
        for _ in range(25):
            await links.ask(server.peer_id, Ping(), (), timeout_s=2.0)
        assert trio.current_time() - began_s == pytest.approx(2.0, abs=0.5)


async def test_links_are_reused_and_closed_when_idle_or_too_many(autojump_clock):
    async with world_of(6, DhtConfig(max_links=3, link_idle_s=100, refresh_period_s=10_000)) as world:
        reader = world.members[0]
        await reader.dht.get(KEY)
        assert reader.dht.statistics().num_links <= 3
        await trio.sleep(200)
        assert reader.dht.statistics().num_links == 0
        await reader.dht.get(KEY)
        num_asked = reader.dht.statistics().num_unanswered
        assert num_asked == 0


async def test_a_cancelled_lookup_harms_nothing(autojump_clock):
    async with world_of(6) as world:
        owner, reader = world.members[:2]
        await owner.dht.put(record_of(world, owner))
        for wait_ms in range(0, 200, 10):
            with trio.move_on_after(wait_ms / 1000):
                await reader.dht.get(KEY)
            with trio.move_on_after(wait_ms / 1000):
                await reader.dht.put(record_of(world, reader, sequence=wait_ms))
        assert set(await reader.dht.get(KEY)) >= {owner.network.peer_id}
        assert reader.dht.statistics().num_unanswered == 0
        assert reader.dht.num_contacts == 5


def test_the_settings_must_make_sense():
    for changes in ({"k": 0}, {"read_quorum": 21}, {"read_window": 3}, {"stagger_s": 0.0}):
        with pytest.raises(ConfigError):
            DhtConfig(**changes)
