"""Announcing and seeing: what servers say arrives, changes are noticed, the dead vanish, the withdrawn go at once."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest
import trio

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import ModelId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.record import SignedRecord, make_record
from p2pswarm.directory.announcement import MODELS_KEY, Listing, encode_listing, model_key, read_announcement
from p2pswarm.directory.announcer import Announcer, AnnouncerConfig
from p2pswarm.directory.directory import Directory, ModelSummary
from p2pswarm.testing.dht_world import DhtMember, DhtWorld, open_dht_world
from p2pswarm.wire.server_info import encode_server_info

MODEL = ModelId("tiny@0123456789abcdef")
OTHER_MODEL = ModelId("other@0123456789abcdef")
CONFIG = AnnouncerConfig(lifetime_s=90)


def info_of(member: DhtMember, start: int = 0, end: int = 4, **changes: object) -> ServerInfo:
    info = ServerInfo(
        peer_id=member.network.peer_id,
        model_id=MODEL,
        span=Span(start, end),
        state=ServerState.ONLINE,
        addresses=member.network.addresses,
        num_model_blocks=8,
        throughput_tokens_per_s=100.0,
        inference_tokens_per_s=200.0,
        forward_tokens_per_s=3000.0,
        network_tokens_per_s=4000.0,
        dtype="float32",
    )
    return replace(info, **changes)


class Servers:
    """A few nodes that announce, and one that reads."""

    def __init__(self, world: DhtWorld, nursery: trio.Nursery) -> None:
        self.world = world
        self.nursery = nursery
        self.members = world.members[:3]
        self.announcers = [self.announcer(member) for member in self.members]
        self.reader = world.members[3]
        self.directory = Directory(self.reader.dht, world.clock, Random(1))

    def announcer(self, member: DhtMember, config: AnnouncerConfig = CONFIG) -> Announcer:
        made = Announcer(member.dht, member.network, self.world.clock, Random(2), config)
        self.nursery.start_soon(made.run)
        return made

    async def announce_all(self) -> None:
        for announcer, member in zip(self.announcers, self.members, strict=True):
            await announcer.announce(info_of(member))


@asynccontextmanager
async def three_servers() -> AsyncIterator[Servers]:
    async with open_dht_world(seed=5) as world, trio.open_nursery() as nursery:
        for _ in range(3):
            await world.add(world.members[:1])
        await world.add(world.members[:1], config=DhtConfig(serve=False))
        yield Servers(world, nursery)
        nursery.cancel_scope.cancel()


async def test_announced_servers_are_found_with_all_they_said(autojump_clock):
    async with three_servers() as servers:
        await servers.announce_all()
        found = await servers.directory.servers(MODEL)
        assert found == {member.network.peer_id: info_of(member) for member in servers.members}
        assert await servers.directory.servers(OTHER_MODEL) == {}


async def test_models_are_listed_with_their_size_and_number_of_servers(autojump_clock):
    async with three_servers() as servers:
        await servers.announce_all()
        await servers.announcers[2].announce(info_of(servers.members[2], model_id=OTHER_MODEL, num_model_blocks=30))
        assert await servers.directory.models() == {
            MODEL: ModelSummary(MODEL, 8, 2),
            OTHER_MODEL: ModelSummary(OTHER_MODEL, 30, 1),
        }


async def test_a_server_that_changes_its_model_is_gone_from_the_old_one(autojump_clock):
    async with three_servers() as servers:
        await servers.announce_all()
        moved = servers.members[2].network.peer_id
        await servers.announcers[2].announce(info_of(servers.members[2], model_id=OTHER_MODEL))
        assert moved not in await servers.directory.servers(MODEL)
        assert moved in await servers.directory.servers(OTHER_MODEL)


async def test_announcements_are_renewed_as_long_as_the_server_lives(autojump_clock):
    async with three_servers() as servers:
        await servers.announce_all()
        await trio.sleep(1000)
        assert len(await servers.directory.servers(MODEL)) == 3


async def test_a_killed_server_vanishes_when_its_announcement_expires(autojump_clock):
    async with three_servers() as servers:
        await servers.announce_all()
        async with servers.directory.watch(MODEL, period_s=10) as view:
            servers.world.memory.kill(servers.members[2].network.peer_id)
            with trio.fail_after(CONFIG.lifetime_s + 1):
                await view.wait_changed()
            assert servers.members[2].network.peer_id not in view.servers
            assert len(view.servers) == 2


async def test_a_withdrawn_server_is_gone_at_once_and_stays_gone(autojump_clock):
    async with three_servers() as servers:
        await servers.announce_all()
        async with servers.directory.watch(MODEL, period_s=10) as view:
            await servers.announcers[0].withdraw()
            assert servers.announcers[0].info is None
            await view.refresh()
            assert servers.members[0].network.peer_id not in view.servers
            await trio.sleep(500)
            assert servers.members[0].network.peer_id not in view.servers
        assert (await servers.directory.models())[MODEL].num_servers == 2


async def test_a_withdrawal_is_short_even_when_nobody_answers_and_we_are_cancelled(autojump_clock):
    async with three_servers() as servers:
        await servers.announce_all()
        for member in [*servers.members[1:], servers.reader]:
            servers.world.memory.hang(member.network.peer_id)
        began_s = trio.current_time()
        with trio.CancelScope() as scope:
            scope.cancel()
            await servers.announcers[0].withdraw()
        assert trio.current_time() - began_s <= CONFIG.withdraw_timeout_s


class StuckNode:
    """Stands in for a `DhtNode` whose puts, at times, wait for somebody who never answers."""

    def __init__(self) -> None:
        self.is_stuck = False
        self.stored: list[SignedRecord] = []

    async def put(self, record: SignedRecord) -> int:
        if self.is_stuck:
            await trio.sleep_forever()
        self.stored.append(record)
        return 1


async def test_a_withdrawal_does_not_wait_for_a_renewal_that_is_stuck(autojump_clock):
    async with open_dht_world(seed=9) as world, trio.open_nursery() as nursery:
        server = await world.add()
        node = StuckNode()
        announcer = Announcer(node, server.network, world.clock, Random(1), CONFIG)
        nursery.start_soon(announcer.run)
        await announcer.announce(info_of(server))
        node.is_stuck = True
        await trio.sleep(CONFIG.lifetime_s / 2)
        node.is_stuck = False
        began_s = trio.current_time()
        await announcer.withdraw()
        assert trio.current_time() == began_s
        announced = [record for record in node.stored if record.key == model_key(MODEL)]
        assert read_announcement(announced[-1], MODEL).state is ServerState.OFFLINE
        nursery.cancel_scope.cancel()


async def test_the_view_notices_who_joins_leaves_and_moves(autojump_clock):
    async with three_servers() as servers:
        first, second, _ = servers.members
        async with servers.directory.watch(MODEL, period_s=5) as view:
            assert view.servers == {}
            await servers.announcers[0].announce(info_of(first, state=ServerState.JOINING))
            await view.wait_changed()
            assert view.servers == {first.network.peer_id: info_of(first, state=ServerState.JOINING)}
            assert view.online == {}
            await servers.announcers[0].announce(info_of(first))
            await view.wait_changed()
            assert set(view.online) == {first.network.peer_id}
            await servers.announcers[1].announce(info_of(second, 4, 8))
            await view.wait_changed()
            assert set(view.online) == {first.network.peer_id, second.network.peer_id}
            await servers.announcers[1].announce(info_of(second, 2, 6))
            await view.wait_changed()
            assert view.servers[second.network.peer_id].span == Span(2, 6)
            await servers.announcers[0].withdraw()
            await view.wait_changed()
            assert set(view.servers) == {second.network.peer_id}


async def test_changes_are_in_the_view_within_its_period(autojump_clock):
    async with three_servers() as servers, servers.directory.watch(MODEL, period_s=5) as view:
        await servers.announcers[0].announce(info_of(servers.members[0]))
        with trio.fail_after(6):
            await view.wait_changed()


async def test_a_renewal_alone_is_no_change(autojump_clock):
    async with three_servers() as servers:
        await servers.announce_all()
        async with servers.directory.watch(MODEL, period_s=5) as view:
            with trio.move_on_after(600) as patience:
                await view.wait_changed()
            assert patience.cancelled_caught


async def test_a_server_found_dead_stays_out_until_it_announces_itself_anew(autojump_clock):
    async with three_servers() as servers:
        await servers.announce_all()
        dead = servers.members[0].network.peer_id
        async with servers.directory.watch(MODEL, period_s=5) as view:
            view.mark_offline(dead)
            assert dead not in view.servers
            await view.refresh()
            assert dead not in view.servers
            await servers.announcers[0].announce(info_of(servers.members[0]))
            await view.refresh()
            assert dead in view.servers


async def test_the_first_to_announce_in_a_new_swarm_is_seen_by_those_who_come_later(autojump_clock):
    async with open_dht_world(seed=6) as world, trio.open_nursery() as nursery:
        first = await world.add()
        announcer = Announcer(first.dht, first.network, world.clock, Random(1))
        nursery.start_soon(announcer.run)
        assert await announcer.announce(info_of(first)) == 1
        late = await world.add([first])
        assert set(await Directory(late.dht, world.clock).servers(MODEL)) == {first.network.peer_id}
        nursery.cancel_scope.cancel()


async def test_a_client_only_server_announces_itself_as_soon_as_a_node_is_there(autojump_clock):
    async with open_dht_world(seed=8) as world, trio.open_nursery() as nursery:
        node = await world.add()
        server = await world.add([node], listens=False)
        world.memory.partition([[node.network.peer_id]])
        announcer = Announcer(server.dht, server.network, world.clock, Random(1))
        nursery.start_soon(announcer.run)
        assert await announcer.announce(info_of(server, addresses=("/ip4/10.9.9.9/tcp/1",))) == 0
        world.memory.heal()
        await trio.sleep(45)
        assert set(await Directory(node.dht, world.clock).servers(MODEL)) == {server.network.peer_id}
        nursery.cancel_scope.cancel()


async def test_nobody_can_announce_another_server(autojump_clock):
    async with three_servers() as servers:
        with pytest.raises(ConfigError, match="another server"):
            await servers.announcers[0].announce(info_of(servers.members[1]))


async def test_announcements_that_make_no_sense_are_left_out(autojump_clock):
    async with three_servers() as servers:
        await servers.announcers[0].announce(info_of(servers.members[0]))
        liar = servers.members[1]
        about_another = encode_server_info(info_of(servers.members[2]))
        of_another_model = encode_server_info(info_of(liar, model_id=OTHER_MODEL))
        async with servers.directory.watch(MODEL, period_s=5) as view:
            for sequence, value in enumerate([about_another, of_another_model, b"", b"\xc1", b"\x80"], start=1):
                await put_value(servers, liar, model_key(MODEL), value, sequence)
                await view.refresh()
                assert set(view.servers) == {servers.members[0].network.peer_id}


async def test_listings_that_make_no_sense_are_left_out(autojump_clock):
    async with three_servers() as servers:
        await servers.announcers[0].announce(info_of(servers.members[0]))
        for sequence, value in enumerate([b"", b"\xc1", b"\x80", b"\x90"], start=1):
            await put_value(servers, servers.members[1], MODELS_KEY, value, sequence)
            assert await servers.directory.models() == {MODEL: ModelSummary(MODEL, 8, 1)}


async def put_value(servers: Servers, owner: DhtMember, key: bytes, value: bytes, sequence: int) -> None:
    expires_unix_s = servers.world.clock.unix_time_s() + 60
    await owner.dht.put(make_record(owner.network, key, value, sequence, expires_unix_s))


async def test_a_model_has_the_size_that_most_of_its_servers_tell(autojump_clock):
    async with three_servers() as servers:
        for member, num_blocks in zip(servers.members, (8, 8, 80), strict=True):
            await put_value(servers, member, MODELS_KEY, encode_listing(Listing(MODEL, num_blocks)), 1)
        assert (await servers.directory.models())[MODEL].num_blocks == 8


async def test_a_new_run_of_a_server_takes_the_place_of_the_old_one(autojump_clock):
    async with three_servers() as servers:
        await servers.announcers[0].announce(info_of(servers.members[0], 0, 4))
        second_run = servers.announcer(servers.members[0])
        await trio.sleep(1)
        await second_run.announce(info_of(servers.members[0], 4, 8))
        found = await servers.directory.servers(MODEL)
        assert found[servers.members[0].network.peer_id].span == Span(4, 8)


async def test_an_error_in_the_body_of_watch_comes_out_as_it_is(autojump_clock):
    async with three_servers() as servers:
        with pytest.raises(KeyError):
            async with servers.directory.watch(MODEL):
                raise KeyError("from the body")
