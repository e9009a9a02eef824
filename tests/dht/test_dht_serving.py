"""A node that finds out that it cannot be dialled turns into a client, and back when it can."""

from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.record import KEY_BYTES, make_record
from p2pswarm.testing.dht_world import DhtMember, open_dht_world

KEY = bytes(range(KEY_BYTES))


async def test_a_node_that_stops_serving_leaves_the_tables_of_others_and_still_reads_and_writes(autojump_clock):
    async with open_dht_world(seed=1) as world:
        first = await world.add()
        second, third = await world.add([first]), await world.add([first])
        await third.dht.set_serving(False)
        await look_up(first), await look_up(second)
        assert third.network.peer_id not in contacts_of(first) | contacts_of(second)
        record = make_record(third.network, KEY, b"value", 1, world.clock.unix_time_s() + 300)
        assert await third.dht.put(record) == 2
        assert await third.dht.get(KEY) == {third.network.peer_id: record}
        assert contacts_of(third) == {first.network.peer_id, second.network.peer_id}


async def test_a_node_that_begins_to_serve_makes_itself_known(autojump_clock):
    async with open_dht_world(seed=2) as world:
        first = await world.add()
        second = await world.add([first])
        await second.dht.set_serving(False)
        await look_up(first)
        third = await world.add([first])
        assert second.network.peer_id not in contacts_of(first) | contacts_of(third)
        await second.dht.set_serving(True)
        assert second.network.peer_id in contacts_of(first) & contacts_of(third)


async def test_others_are_told_a_new_address_at_once(autojump_clock):
    async with open_dht_world(seed=3) as world:
        first = await world.add()
        second = await world.add([first])
        second.network.publish(["/ip4/192.0.2.9/tcp/4001"])
        await second.dht.set_serving(True)
        await look_up(second)
        assert (
            first.dht.contacts()[0].addresses
            == second.network.addresses
            == (f"/ip4/192.0.2.9/tcp/4001/p2p/{second.network.peer_id}",)
        )


async def test_a_client_by_its_settings_never_serves(autojump_clock):
    async with open_dht_world(seed=4) as world:
        first = await world.add()
        client = await world.add([first], config=DhtConfig(serve=False))
        await client.dht.set_serving(True)
        await look_up(client)
        assert not client.dht.serves
        assert contacts_of(first) == set()


def contacts_of(member: DhtMember) -> set[str]:
    return {contact.peer_id for contact in member.dht.contacts()}


async def look_up(member: DhtMember) -> None:
    await member.dht.get(KEY)
