"""A node finds out how fast its line is, from peers that grant only so much of it."""

import math

import pytest
import trio

from p2pswarm.core.errors import BadAnswer, DeadlineExceeded, ServerBusy
from p2pswarm.core.ids import PeerId
from p2pswarm.net.network import Stream
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.rpc.speed_tests import SIZES_BYTES, SpeedTestGrants, meaningless, measure_line_bits_per_s
from p2pswarm.testing.memory_network import Link
from p2pswarm.testing.rpc_world import TIMEOUT_S, open_world
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import SpeedTest, SpeedTestReply

MIB = 1 << 20
PEER, OTHER = PeerId("peer"), PeerId("other")


@pytest.mark.parametrize("mbit_per_s", [0.5, 10, 100])
@pytest.mark.parametrize("latency_s", [0.001, 0.01])
async def test_the_speed_of_the_line_is_found(mbit_per_s: float, latency_s: float, autojump_clock: object) -> None:
    async with open_world() as world:
        link = Link(latency_s, bandwidth_bytes_per_s=mbit_per_s * 1e6 / 8)
        world.memory.set_link(world.peer_id, world.network.peer_id, link)
        measured = await measure_line_bits_per_s(world.network, world.client, world.peer_id, TIMEOUT_S)
        assert measured / 1e6 == pytest.approx(mbit_per_s, rel=0.25)
        world.client.close()
        await world.until_quiet()


async def test_a_slow_line_is_not_filled_for_long(autojump_clock: object) -> None:
    async with open_world() as world:
        world.memory.set_link(world.peer_id, world.network.peer_id, Link(0.05, bandwidth_bytes_per_s=20e3))
        began_at_s = trio.current_time()
        await measure_line_bits_per_s(world.network, world.client, world.peer_id, TIMEOUT_S)
        assert trio.current_time() - began_at_s < 3 * 2 * SIZES_BYTES[0] / 20e3


async def test_a_line_that_is_too_slow_is_given_up(autojump_clock: object) -> None:
    async with open_world() as world:
        world.memory.set_link(world.peer_id, world.network.peer_id, Link(0.05, bandwidth_bytes_per_s=1e3))
        with pytest.raises(DeadlineExceeded, match=r"did not answer SpeedTest within 2 s"):
            await measure_line_bits_per_s(world.network, world.client, world.peer_id, 2.0)


async def test_a_peer_that_answers_too_little_is_not_believed(autojump_clock: object) -> None:
    async def serve(stream: Stream) -> None:
        framed = FramedStream(stream)
        while await framed.receive() is not None:
            await framed.send(SpeedTestReply(meaningless(3)))

    async with open_world() as world:
        world.serve_instead(serve)
        with pytest.raises(BadAnswer, match="sent 3 bytes, wanted 10"):
            await world.client.speed_test(world.peer_id, 0, 10, TIMEOUT_S)


async def test_a_peer_is_granted_only_so_much_and_others_all_the_same(autojump_clock: object) -> None:
    limits = RpcLimits(max_speed_test_bytes_per_peer=3 * MIB)
    async with open_world(limits=limits) as world:
        await world.client.speed_test(world.peer_id, MIB, 2 * MIB, TIMEOUT_S)
        with pytest.raises(ServerBusy, match="no more than 3145728 bytes of speed tests a peer"):
            await world.client.speed_test(world.peer_id, 0, 1, TIMEOUT_S)
        await world.other_client.speed_test(world.peer_id, 0, MIB, TIMEOUT_S)
        await trio.sleep(limits.speed_test_period_s)
        await world.client.speed_test(world.peer_id, 0, MIB, TIMEOUT_S)


def test_all_peers_together_are_granted_only_so_much() -> None:
    grants = SpeedTestGrants(RpcLimits(max_speed_test_bytes=4 * MIB, max_speed_test_bytes_per_peer=3 * MIB))
    asked = SpeedTest(meaningless(MIB), answer_bytes=MIB)
    assert grants.answer(asked, PEER, now_s=0.0).data.shape == (MIB,)
    grants.answer(asked, OTHER, now_s=1.0)
    with pytest.raises(ServerBusy, match="for all peers"):
        grants.answer(SpeedTest(meaningless(0), answer_bytes=1), OTHER, now_s=math.nextafter(60.0, 0.0))
    grants.answer(asked, PEER, now_s=60.0)
