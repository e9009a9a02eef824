"""How member lists spread, and what becomes of those who are no longer on them. Protocol `/p2pswarm/members/1`.

Two nodes that connect agree on the newer of their lists in the handshake (`psk_noise.py`). A list that comes later, by
the operator's file or from another node, goes to all who are connected: each gets a stream with the text of the list,
and closes it when it has been read. So a change crosses the swarm in as many steps as the swarm is wide.

Who was removed is told in the same way, has half a second to take it, and is disconnected: its sessions end there and
then. A node that finds itself removed disconnects from everybody.
"""

import logging

import trio

from p2pswarm.core.errors import NetworkError, NotAMember, ProtocolViolation, RemoteError
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.network import Network, Stream
from p2pswarm.net.private.member_list import MAX_LIST_BYTES, MemberList
from p2pswarm.net.private.members import Members

MEMBERS_PROTOCOL = ProtocolId("/p2pswarm/members/1")
LOOK_AT_FILE_EVERY_S = 2.0
"""An operator who removes somebody waits this long at most; a look takes microseconds."""
TELL_TIMEOUT_S = 10.0
TELL_REMOVED_TIMEOUT_S = 0.5
RECEIVE_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


class MemberExchange:
    """Keeps one node's connections to members, by the newest list."""

    def __init__(self, network: Network, members: Members) -> None:
        self._network = network
        self._members = members
        network.serve(MEMBERS_PROTOCOL, self._receive)

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_at_file)
            version = self._members.version
            while True:
                await self._members.wait_newer_than(version)
                assert self._members.newest is not None, "it has a version"
                version = self._members.version
                for peer_id in self._network.connected_peers:
                    nursery.start_soon(self._pass_on, peer_id, self._members.newest)

    async def _look_at_file(self) -> None:
        while True:
            await trio.sleep(LOOK_AT_FILE_EVERY_S)
            self._members.look_at_file()

    async def _pass_on(self, peer_id: PeerId, newest: MemberList) -> None:
        may_stay = newest.has(peer_id) and newest.has(self._network.peer_id)
        try:
            with trio.move_on_after(TELL_TIMEOUT_S if may_stay else TELL_REMOVED_TIMEOUT_S):
                await self._tell(peer_id, newest)
        except (NetworkError, RemoteError, NotAMember) as error:
            logger.debug("%s was not told of the new member list: %s", peer_id, error)
        if not may_stay:
            logger.info("disconnected from %s, by version %d of the member list", peer_id, newest.version)
            await self._network.disconnect(peer_id)

    async def _tell(self, peer_id: PeerId, newest: MemberList) -> None:
        stream = await self._network.open_stream(peer_id, MEMBERS_PROTOCOL)
        try:
            await stream.write(newest.text)
            await stream.close_write()
            await stream.read()  # its end: the list has been taken
        finally:
            stream.reset()

    async def _receive(self, stream: Stream) -> None:
        text = b""
        with trio.move_on_after(RECEIVE_TIMEOUT_S) as deadline:
            while data := await stream.read():
                text += data
                if len(text) > MAX_LIST_BYTES:
                    raise ProtocolViolation(f"{stream.peer_id} sent a member list without an end", stream.peer_id)
        if not deadline.cancelled_caught:
            self._members.take(MemberList.parse(text))
