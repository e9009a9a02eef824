"""Handshakes between two upgraders over a pipe in memory that remembers what went over it."""

from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import memory_stream_pair

from p2pswarm.core.errors import ConnectionLost, NetworkError
from p2pswarm.net.config import DEFAULT_CONFIG
from p2pswarm.net.connection import Connection
from p2pswarm.net.identity import Identity
from p2pswarm.net.path import DIRECT, ConnectionPath
from p2pswarm.net.private.member_list import MemberList
from p2pswarm.net.private.private_swarm import PrivateSwarm
from p2pswarm.net.private.swarm_key import SwarmKey
from p2pswarm.net.upgrade import Upgrader

OWNER, ONE, OTHER, THIRD = (Identity.generate(bytes([number]) * 32) for number in (1, 2, 3, 4))
KEY = SwarmKey(bytes(range(32)), OWNER.peer_id)
OTHER_KEY = SwarmKey(bytes(32), OWNER.peer_id)


class MemoryPipe:
    """One end, as `net.pipe.Pipe`."""

    is_socket = True

    def __init__(self, stream: trio.StapledStream, record: bytearray) -> None:
        self._stream = stream
        self._record = record

    @property
    def path(self) -> ConnectionPath:
        return DIRECT

    async def send_all(self, data: bytes) -> None:
        self._record += data
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost("the pipe broke") from error

    async def receive_some(self, max_bytes: int) -> bytes:
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost("the pipe broke") from error

    def send_now(self, data: bytes) -> int:
        return 0

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def wait_closed(self) -> None:
        await trio.sleep_forever()


@dataclass
class Meeting:
    """What came of a handshake at its two ends."""

    dialler: Connection | NetworkError
    acceptor: Connection | NetworkError
    sent: dict[str, bytearray] = field(default_factory=dict)


async def meet(
    dialler: PrivateSwarm | None, acceptor: PrivateSwarm | None, expected: Identity = OTHER, real: Identity = OTHER
) -> Meeting:
    """`ONE` dials `expected`, where `real` accepts."""
    ends = memory_stream_pair()
    sent = {"dialler": bytearray(), "acceptor": bytearray()}
    outcomes: dict[str, Connection | NetworkError] = {}

    async def upgrade(name: str, upgrader: Upgrader, stream: trio.StapledStream, to: Identity | None) -> None:
        try:
            pipe = MemoryPipe(stream, sent[name])
            outcomes[name] = await (upgrader.accepted(pipe) if to is None else upgrader.dialled(pipe, to.peer_id))
        except NetworkError as error:
            outcomes[name] = error

    with trio.fail_after(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upgrade, "dialler", Upgrader(ONE, DEFAULT_CONFIG, dialler), ends[0], expected)
            nursery.start_soon(upgrade, "acceptor", Upgrader(real, DEFAULT_CONFIG, acceptor), ends[1], None)
    return Meeting(outcomes["dialler"], outcomes["acceptor"], sent)


def swarm(key: SwarmKey = KEY, newest: MemberList | None = None) -> PrivateSwarm:
    private = PrivateSwarm.of(key)
    if newest is not None:
        private.members.take(newest)
    return private


def members(version: int, *listed: Identity) -> MemberList:
    return MemberList.sign(OWNER, version, [identity.peer_id for identity in listed])


def text_of(outcome: Connection | NetworkError) -> str:
    assert isinstance(outcome, ConnectionLost), outcome
    return str(outcome)


def peer_of(outcome: Connection | NetworkError) -> str:
    assert not isinstance(outcome, NetworkError), outcome
    return outcome.peer_id


async def test_two_with_the_same_key_connect_and_know_each_other() -> None:
    meeting = await meet(swarm(), swarm())
    assert (peer_of(meeting.dialler), peer_of(meeting.acceptor)) == (OTHER.peer_id, ONE.peer_id)


async def test_two_without_a_key_connect_as_ever() -> None:
    meeting = await meet(None, None)
    assert (peer_of(meeting.dialler), peer_of(meeting.acceptor)) == (OTHER.peer_id, ONE.peer_id)


async def test_stranger_is_told_that_the_swarm_is_private() -> None:
    meeting = await meet(None, swarm())
    assert "belongs to a private swarm, whose key is needed (--swarm-key)" in text_of(meeting.dialler)
    assert isinstance(meeting.acceptor, ConnectionLost)


async def test_member_is_told_that_the_other_node_has_no_key() -> None:
    meeting = await meet(swarm(), None)
    assert "has no swarm key" in text_of(meeting.dialler)
    assert isinstance(meeting.acceptor, ConnectionLost)


@pytest.mark.parametrize("other", [OTHER_KEY, SwarmKey(KEY.secret, THIRD.peer_id)], ids=["secret", "owner"])
async def test_both_are_told_that_the_keys_differ(other: SwarmKey) -> None:
    meeting = await meet(swarm(other), swarm())
    assert "has another swarm key" in text_of(meeting.dialler)
    assert "has another swarm key" in text_of(meeting.acceptor)


@pytest.mark.parametrize("stranger", [None, swarm(OTHER_KEY)], ids=["no key", "other key"])
async def test_nobody_without_the_key_learns_who_is_there(stranger: PrivateSwarm | None) -> None:
    meeting = await meet(stranger, swarm(KEY, members(1, ONE, OTHER)))
    said = bytes(meeting.sent["acceptor"])
    assert OTHER.public_bytes not in said
    assert OTHER.peer_id.encode() not in said
    assert len(said) < 100, "two lines of negotiation and a refusal"


async def test_another_node_than_was_dialled_is_refused() -> None:
    meeting = await meet(swarm(), swarm(), expected=THIRD, real=OTHER)
    assert f"{OTHER.peer_id} is there, not {THIRD.peer_id}" in text_of(meeting.dialler)


@pytest.mark.parametrize("dialler_knows", [True, False])
async def test_the_newer_member_list_comes_along_with_the_handshake(dialler_knows: bool) -> None:
    old, new = swarm(KEY, members(1, ONE, OTHER)), swarm(KEY, members(2, ONE, OTHER, THIRD))
    dialler, acceptor = (new, old) if dialler_knows else (old, new)
    meeting = await meet(dialler, acceptor)
    assert (peer_of(meeting.dialler), peer_of(meeting.acceptor)) == (OTHER.peer_id, ONE.peer_id)
    await trio.testing.wait_all_tasks_blocked()
    assert old.members.version == 2


async def test_list_longer_than_one_message_comes_along() -> None:
    crowd = [Identity.generate(number.to_bytes(32, "big")) for number in range(2000)]
    newcomer = swarm()
    meeting = await meet(newcomer, swarm(KEY, members(1, ONE, OTHER, *crowd)))
    assert peer_of(meeting.dialler) == OTHER.peer_id
    assert newcomer.members.version == 1


async def test_removed_dialler_is_refused_and_learns_why() -> None:
    removed = swarm(KEY, members(1, ONE, OTHER))
    meeting = await meet(removed, swarm(KEY, members(2, OTHER)))
    assert f"{ONE.peer_id}, this node, is not a member" in text_of(meeting.dialler)
    assert f"{ONE.peer_id} is not a member of the private swarm" in text_of(meeting.acceptor)
    assert removed.members.version == 2


async def test_removed_acceptor_is_refused_and_learns_why() -> None:
    removed = swarm(KEY, members(1, ONE, OTHER))
    meeting = await meet(swarm(KEY, members(2, ONE)), removed)
    assert f"{OTHER.peer_id} is not a member of the private swarm" in text_of(meeting.dialler)
    assert f"{OTHER.peer_id}, this node, is not a member" in text_of(meeting.acceptor)


async def test_recorded_first_message_opens_nothing() -> None:
    meeting = await meet(swarm(), swarm())
    recorded = bytes(meeting.sent["dialler"])
    ends = memory_stream_pair()
    said = bytearray()

    async def accept() -> None:
        with pytest.raises(ConnectionLost):
            await Upgrader(OTHER, DEFAULT_CONFIG, swarm()).accepted(MemoryPipe(ends[1], said))

    with trio.fail_after(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            await ends[0].send_all(recorded)
            await ends[0].send_eof()
    assert OTHER.public_bytes not in said
