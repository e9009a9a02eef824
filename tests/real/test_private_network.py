"""A private swarm over real sockets: the network keeps its contract, strangers see nothing, removed members go."""

import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from recording_proxy import Recording, recording_proxy

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.membership import join_swarm
from p2pswarm.core.clock import SystemClock
from p2pswarm.core.errors import ConnectionLost, NoPeersError, NotAMember, PeerUnreachable
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.dht.node import DhtNode
from p2pswarm.directory.announcer import Announcer
from p2pswarm.net.addresses import parse_tcp_address, split_peer_address
from p2pswarm.net.host import Host, open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.negotiation import GREETING, encode_message
from p2pswarm.net.network import Network, Stream
from p2pswarm.net.private.invitation import Invitation
from p2pswarm.net.private.member_list import MemberList
from p2pswarm.net.private.private_swarm import PrivateSwarm
from p2pswarm.net.private.swarm_key import SwarmKey
from p2pswarm.testing.network_contract import CONTRACT, ECHO, Check, Nodes, echo, read_all

pytestmark = pytest.mark.real
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
OWNER = Identity.generate(bytes([9]) * 32)
KEY = SwarmKey.generate(OWNER)
MODEL = ModelId("secret-model@0123456789abcdef")
REFUSED_WITHIN_S = 2.0
MAX_SAID_TO_STRANGERS = 250
"""Bytes, for a few dials of some lines of negotiation each; one handshake of `/noise` alone has as many."""
CONFIG = ClientConfig(known_peers_path=None)


def node(identity: Identity, private: PrivateSwarm | None) -> AbstractAsyncContextManager[Host]:
    return open_network(identity, listen=[LOOPBACK], private=private)


def open_member() -> AbstractAsyncContextManager[Network]:
    return node(Identity.generate(), PrivateSwarm.of(KEY))


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
async def test_network_of_a_private_swarm_keeps_the_contract(check: Check) -> None:
    await check(Nodes(open_member, longest_wait_s=0.004))


async def hold_stream(network: Network, peer_id: PeerId) -> Stream:
    """A stream on which an echo has come back."""
    stream = await network.open_stream(peer_id, ECHO)
    await assert_echoes(stream)
    return stream


async def assert_echoes(stream: Stream) -> None:
    await stream.write(b"as ever")
    assert await stream.read(100) == b"as ever"


def members(version: int, *listed: Identity) -> MemberList:
    return MemberList.sign(OWNER, version, [identity.peer_id for identity in listed])


def private_with(newest: MemberList) -> PrivateSwarm:
    private = PrivateSwarm.of(KEY)
    private.members.take(newest)
    return private


# Strangers


@asynccontextmanager
async def serving_member(identity: Identity, private: PrivateSwarm) -> AsyncIterator[tuple[str, Recording]]:
    """A node that serves a model, and its address behind a proxy that records."""
    async with node(identity, private) as network, trio.open_nursery() as nursery:
        network.serve(ECHO, echo)
        dht = DhtNode(network, SystemClock(), random.Random(1))
        await nursery.start(dht.run)
        announcer = Announcer(dht, network, SystemClock(), random.Random(2))
        nursery.start_soon(announcer.run)
        await announcer.announce(replace(INFO, peer_id=network.peer_id, addresses=network.addresses))
        port = parse_tcp_address(split_peer_address(network.addresses[0])[0]).port
        recording = await nursery.start(recording_proxy, port)
        yield f"/ip4/127.0.0.1/tcp/{recording.port}/p2p/{network.peer_id}", recording
        nursery.cancel_scope.cancel()


INFO = ServerInfo(
    peer_id=PeerId(""),
    model_id=MODEL,
    span=Span(0, 4),
    state=ServerState.ONLINE,
    addresses=(),
    num_model_blocks=8,
    throughput_tokens_per_s=100.0,
    inference_tokens_per_s=200.0,
    forward_tokens_per_s=3000.0,
    network_tokens_per_s=4000.0,
    dtype="float32",
)
SERVER, REMOVED, MEMBER = (Identity.generate(bytes([number]) * 32) for number in (1, 2, 3))
STRANGERS = {
    "without a key": (None, "belongs to a private swarm"),
    "with another key": (SwarmKey.generate(OWNER), "has another swarm key"),
    "removed from the list": (KEY, f"{REMOVED.peer_id}, this node, is not a member"),
}


@pytest.mark.parametrize(("key", "reason"), STRANGERS.values(), ids=STRANGERS.keys())
async def test_stranger_is_refused_at_once_and_sees_nothing(key: SwarmKey | None, reason: str) -> None:
    async with serving_member(SERVER, private_with(members(1, SERVER, MEMBER))) as (address, recording):
        with trio.fail_after(REFUSED_WITHIN_S), pytest.raises(NoPeersError, match=reason):
            async with join_swarm([address], identity=REMOVED, config=CONFIG, swarm_key=key):
                pass
        if key != KEY:
            assert len(recording.from_target) < MAX_SAID_TO_STRANGERS
        seen = recording.everything
        for secret in (SERVER.public_bytes, MEMBER.public_bytes, KEY.secret, KEY.swarm_id.encode(), b"secret-model"):
            assert secret not in seen
        for part_of_address in (SERVER.peer_id.encode(), MEMBER.peer_id.encode(), b"127.0.0.1", b"/tcp/", b"/p2p/"):
            assert part_of_address not in seen
        async with join_swarm([address], identity=MEMBER, config=CONFIG, swarm_key=KEY) as membership:
            assert MODEL in await membership.directory.models()


async def test_invitation_is_all_that_a_newcomer_needs() -> None:
    async with (
        serving_member(SERVER, PrivateSwarm.of(KEY)) as (address, _),
        join_swarm([str(Invitation(KEY, (address,)))], config=CONFIG) as membership,
    ):
        assert MODEL in await membership.directory.models()


async def test_stranger_who_asks_for_protocols_is_told_of_the_handshake_and_of_lanes_only() -> None:
    async with serving_member(SERVER, PrivateSwarm.of(KEY)) as (_, recording):
        stream = await trio.open_tcp_stream("127.0.0.1", recording.port)
        await stream.send_all(encode_message(GREETING) + encode_message("ls"))
        answer = b""
        with trio.fail_after(REFUSED_WITHIN_S):
            while b"lane" not in answer:
                answer += await stream.receive_some()
        assert answer == encode_message(GREETING) + encode_message("/p2pswarm/noise-psk/1\n/p2pswarm/lane/1\n")
        await stream.aclose()


# Members who are removed


async def test_removed_member_is_cut_off_in_mid_stream_and_the_others_are_not() -> None:
    before, after = members(1, SERVER, REMOVED, MEMBER), members(2, SERVER, MEMBER)
    at_server = private_with(before)
    async with (
        node(SERVER, at_server) as server,
        node(REMOVED, PrivateSwarm.of(KEY)) as removed,
        node(MEMBER, PrivateSwarm.of(KEY)) as member,
    ):
        for network in (server, member):
            network.serve(ECHO, echo)
        for network in (removed, member):
            network.add_addresses(server.peer_id, server.addresses)
        removed.add_addresses(member.peer_id, member.addresses)
        lost = [await hold_stream(removed, server.peer_id), await hold_stream(removed, member.peer_id)]
        kept = await hold_stream(member, server.peer_id)
        at_server.members.take(after)
        with trio.fail_after(REFUSED_WITHIN_S):
            for stream in lost:
                with pytest.raises(ConnectionLost):
                    await read_all(stream)
            for peer_id in (server.peer_id, member.peer_id):
                with pytest.raises(NotAMember, match="this node, is not a member of the private swarm any more"):
                    await removed.open_stream(peer_id, ECHO)
        await assert_echoes(kept)
        assert server.connected_peers == {member.peer_id}


async def test_removed_member_is_not_dialled_either() -> None:
    async with (
        node(SERVER, private_with(members(2, SERVER))) as server,
        node(REMOVED, private_with(members(1, SERVER, REMOVED))) as removed,
    ):
        server.add_addresses(removed.peer_id, removed.addresses)
        with trio.fail_after(REFUSED_WITHIN_S), pytest.raises(PeerUnreachable, match="is not a member"):
            await server.open_stream(removed.peer_id, ECHO)


async def test_change_of_the_operators_file_reaches_everybody(tmp_path: Path) -> None:
    given = tmp_path / "members"
    given.write_bytes(members(1, SERVER, MEMBER, REMOVED).text)
    told = PrivateSwarm.of(KEY)
    async with node(SERVER, PrivateSwarm.of(KEY, given=given)) as server, node(MEMBER, told) as member:
        await member.connect(server.addresses[0])
        assert told.members.version == 1
        given.write_bytes(members(2, SERVER, MEMBER).text)
        with trio.fail_after(5):
            await told.members.wait_newer_than(1)
        assert not told.members.has(REMOVED.peer_id)
