"""Tickets of lanes: who has one gets in once, and nobody else does."""

import pytest
import trio

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.net.nat.lanes import TICKET_BYTES, ExpectedLanes
from p2pswarm.net.path import DIRECT
from p2pswarm.net.pipe import TcpPipe


def pair() -> tuple[TcpPipe, TcpPipe]:
    one, other = map(trio.SocketStream, trio.socket.socketpair())
    return TcpPipe(one, DIRECT), TcpPipe(other, DIRECT)


async def test_a_lane_comes_to_who_expects_it_and_is_closed_in_the_end() -> None:
    lanes = ExpectedLanes()
    ours, theirs = pair()
    with lanes.expect() as expected:
        await ours.send_all(b"and more")
        lanes.take(theirs, expected.ticket)
        assert expected.has_come.is_set()
        assert expected.lane is not None
        assert await expected.lane.read(100) == b"and more"
        await expected.lane.write(b"back")
        assert await ours.receive_some(100) == b"back"
    await theirs.wait_closed()
    assert await ours.receive_some(100) == b""
    await ours.aclose()


async def test_a_ticket_is_good_for_one_lane_as_long_as_it_is_expected() -> None:
    lanes = ExpectedLanes()
    with lanes.expect() as expected:
        tickets = [expected.ticket, expected.ticket, bytes(TICKET_BYTES), expected.ticket[:-1]]
        for index, ticket in enumerate(tickets):
            ours, theirs = pair()
            await ours.aclose()
            if index == 0:
                lanes.take(theirs, ticket)
                continue
            with pytest.raises(ConnectionLost, match="ticket"):
                lanes.take(theirs, ticket)
            await theirs.aclose()
    with lanes.expect() as withdrawn:
        pass
    ours, theirs = pair()
    with pytest.raises(ConnectionLost, match="ticket"):
        lanes.take(theirs, withdrawn.ticket)
    await ours.aclose()
    await theirs.aclose()


async def test_no_two_tickets_are_the_same() -> None:
    lanes = ExpectedLanes()
    with lanes.expect() as one, lanes.expect() as other:
        assert one.ticket != other.ticket
