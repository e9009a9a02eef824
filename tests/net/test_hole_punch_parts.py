"""The parts of hole punching that need no routers: its messages, its addresses, asking where we are seen."""

import contextlib
from collections.abc import Sequence
from random import Random

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from p2pswarm.core.errors import ProtocolViolation, SwarmingError
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.libp2p_parts import HolePunch, Multiaddr
from p2pswarm.net.nat.hole_punch_messages import (
    MAX_ADDRESSES,
    encode_connect,
    encode_sync,
    read_connect,
    read_sync,
)
from p2pswarm.net.nat.probing import Probing
from p2pswarm.net.nat.protobuf_frames import frame
from p2pswarm.net.nat.punch_addresses import own_candidates, worth_dialling
from p2pswarm.net.nat.seen_addresses import LIFETIME_S, SeenAddresses
from p2pswarm.net.network import Buffer
from p2pswarm.testing.memory_network import MemoryNetwork

ROUTER = TcpAddress("ip4", "203.0.113.7", 51234)
SAME_PORT = TcpAddress("ip4", "203.0.113.7", 4001)
HOME = TcpAddress("ip4", "192.168.1.5", 4001)
LOOPBACK = TcpAddress("ip4", "127.0.0.1", 4001)


class Incoming:
    """A stream from which these bytes can be read."""

    peer_id = PeerId("peer")
    protocol = ProtocolId("/libp2p/dcutr")

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def read(self, max_bytes: int = 1 << 20) -> bytes:
        data, self.data = self.data[:max_bytes], self.data[max_bytes:]
        return data

    async def write(self, *buffers: Buffer) -> None: ...

    async def close_write(self) -> None: ...

    def reset(self) -> None: ...


ports = st.integers(1, 65535)
tcp_addresses = st.one_of(
    st.builds(lambda ip, port: TcpAddress("ip4", str(ip), port), st.ip_addresses(v=4), ports),
    st.builds(lambda ip, port: TcpAddress("ip6", str(ip), port), st.ip_addresses(v=6), ports),
).filter(lambda address: address.is_dialable)


@given(st.lists(tcp_addresses, max_size=12, unique=True))
def test_addresses_survive_the_message_up_to_their_limit(addresses: Sequence[TcpAddress]) -> None:
    async def main() -> None:
        stream = Incoming(encode_connect(addresses) + encode_sync())
        assert await read_connect(stream) == tuple(addresses[:MAX_ADDRESSES])
        await read_sync(stream)
        assert stream.data == b""

    trio.run(main)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_message_or_an_error_of_ours(data: bytes) -> None:
    async def main() -> None:
        for incoming in (data, frame(data)):
            with contextlib.suppress(SwarmingError):
                await read_connect(Incoming(incoming))

    trio.run(main)


async def test_messages_in_the_wrong_order_are_violations() -> None:
    with pytest.raises(ProtocolViolation, match="sync where"):
        await read_connect(Incoming(encode_sync()))
    with pytest.raises(ProtocolViolation, match="where a sync was due"):
        await read_sync(Incoming(encode_connect([ROUTER])))


async def test_addresses_of_other_transports_are_left_out() -> None:
    message = HolePunch(type=HolePunch.CONNECT)
    for address in ("/ip4/203.0.113.7/udp/4001/quic-v1", str(ROUTER), "/dns4/example.org/tcp/4001"):
        message.ObsAddrs.append(Multiaddr(address).to_bytes())
    message.ObsAddrs.append(b"\xff\xff")
    assert await read_connect(Incoming(frame(message.SerializeToString()))) == (ROUTER,)


def test_candidates_are_the_router_with_its_port_and_ours_and_then_the_home_network() -> None:
    interface_hosts = ["127.0.0.1", "192.168.1.5", "fd00::2"]
    assert own_candidates(ROUTER, {"ip4": 4001}, interface_hosts) == [ROUTER, SAME_PORT, HOME]
    assert own_candidates(SAME_PORT, {"ip4": 4001}, interface_hosts) == [SAME_PORT, HOME]
    assert own_candidates(None, {"ip4": 4001, "ip6": 9}, interface_hosts) == [HOME, TcpAddress("ip6", "fd00::2", 9)]
    assert own_candidates(None, {}, interface_hosts) == []


def test_a_peer_cannot_have_us_knock_at_our_own_machine() -> None:
    theirs = [ROUTER, LOOPBACK, TcpAddress("ip4", "169.254.0.9", 4001), TcpAddress("ip4", "224.0.0.1", 4001), HOME]
    assert worth_dialling(theirs, own=[HOME]) == [ROUTER]


def test_nodes_of_one_machine_may_knock_at_each_other() -> None:
    seen = TcpAddress("ip4", "127.0.0.1", 50000)
    assert worth_dialling([LOOPBACK], own=[seen]) == [LOOPBACK]


async def test_relay_is_asked_once_a_minute_where_it_sees_us(autojump_clock: MockClock) -> None:
    memory = MemoryNetwork(Random(5))
    async with memory.node(1) as asker, memory.node(2) as relay:
        await asker.connect(relay.addresses[0])
        seen = SeenAddresses(asker)
        assert await seen.ask(relay.peer_id) is None
        Probing(relay).serve()
        address = await seen.ask(relay.peer_id)
        assert address is not None
        assert f"/ip4/{address.host}/" in asker.addresses[0]
        relay.serve(ProtocolId("/p2pswarm/probe/1"), never_asked)
        assert await seen.ask(relay.peer_id) == address
        await trio.sleep(LIFETIME_S)
        assert await seen.ask(relay.peer_id) is None


async def never_asked(stream: object) -> None:
    raise ProtocolViolation("not asked again within a minute")
