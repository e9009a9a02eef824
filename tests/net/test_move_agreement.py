"""Agreeing over a new pipe that an open connection goes on over it, and who may not."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import trio
from trio.testing import memory_stream_pair

from p2pswarm.core.errors import ConnectionLost, NetworkError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.config import DEFAULT_CONFIG
from p2pswarm.net.connection import Connection
from p2pswarm.net.identity import Identity
from p2pswarm.net.mux_connection import MuxConnection
from p2pswarm.net.path import DIRECT, ConnectionPath
from p2pswarm.net.private.private_swarm import PrivateSwarm
from p2pswarm.net.private.swarm_key import SwarmKey
from p2pswarm.net.upgrade import Upgrader

ONE, OTHER, STRANGER = (Identity.generate(bytes([number]) * 32) for number in (1, 2, 3))
RELAYED = ConnectionPath(relay=PeerId("relay"))
DIRECT_AT_LAST = replace(DIRECT, left_relay=RELAYED.relay)


class MemoryPipe:
    """One end, as `net.pipe.Pipe`."""

    is_socket = True

    def __init__(self, stream: trio.StapledStream, path: ConnectionPath) -> None:
        self.path = path
        self.is_closed = False
        self._stream = stream

    async def send_all(self, data: bytes | bytearray) -> None:
        try:
            await self._stream.send_all(bytes(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost("the pipe broke") from error

    async def receive_some(self, max_bytes: int) -> bytes:
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost("the pipe broke") from error

    def send_now(self, data: bytes | bytearray) -> int:
        return 0

    async def aclose(self) -> None:
        self.is_closed = True
        await trio.aclose_forcefully(self._stream)

    async def wait_closed(self) -> None:
        await trio.sleep_forever()


def new_pipes(path: ConnectionPath) -> tuple[MemoryPipe, MemoryPipe]:
    one, other = memory_stream_pair()
    return MemoryPipe(one, path), MemoryPipe(other, path)


@dataclass
class Pair:
    """A relayed connection between two nodes, and the pipes it runs over."""

    one: Upgrader
    other: Upgrader
    ours: MuxConnection
    theirs: MuxConnection
    pipes: tuple[MemoryPipe, MemoryPipe]


async def connect(
    one: Upgrader, other: Upgrader, to: Identity, path: ConnectionPath
) -> tuple[Connection, Connection, tuple[MemoryPipe, MemoryPipe]]:
    pipes = new_pipes(path)
    found: dict[str, Connection] = {}

    async def dial() -> None:
        found["dialled"] = await one.dialled(pipes[0], to.peer_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial)
        accepted = await other.accepted(pipes[1])
        assert accepted is not None
    return found["dialled"], accepted, pipes


@asynccontextmanager
async def relayed_pair(private: PrivateSwarm | None = None) -> AsyncIterator[Pair]:
    one, other = (Upgrader(identity, DEFAULT_CONFIG, private) for identity in (ONE, OTHER))
    ours, theirs, pipes = await connect(one, other, OTHER, RELAYED)
    assert isinstance(ours, MuxConnection)
    assert isinstance(theirs, MuxConnection)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.run)
        nursery.start_soon(theirs.run)
        yield Pair(one, other, ours, theirs, pipes)
        nursery.cancel_scope.cancel()


async def move(upgrader: Upgrader, connection: MuxConnection, to: Upgrader) -> tuple[list[NetworkError], object]:
    """What goes wrong at the dialler, and what the listener makes of it."""
    pipes = new_pipes(DIRECT)
    errors: list[NetworkError] = []

    async def lead() -> None:
        try:
            await upgrader.move(connection, pipes[0])
        except NetworkError as error:
            errors.append(error)

    accepted: object
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lead)
            try:
                accepted = await to.accepted(pipes[1])
            except NetworkError as error:
                accepted = error
    if errors:
        assert all(pipe.is_closed for pipe in pipes)
    return errors, accepted


@pytest.mark.parametrize(
    "private", [None, PrivateSwarm.of(SwarmKey(bytes(range(32)), STRANGER.peer_id))], ids=["open", "private"]
)
async def test_open_stream_goes_on_over_the_new_pipe_and_the_old_one_is_closed(private: PrivateSwarm | None) -> None:
    async with relayed_pair(private) as pair:
        ours = await pair.ours.open_stream()
        theirs = await pair.theirs.accept_stream()
        assert theirs is not None
        await ours.write(b"before, ")
        assert await move(pair.one, pair.ours, pair.other) == ([], None)
        await ours.write(b"after")
        assert await read_exactly(theirs, 13) == b"before, after"
        await theirs.write(b"and back")
        assert await read_exactly(ours, 8) == b"and back"
        await trio.testing.wait_all_tasks_blocked()
        assert (pair.ours.path, pair.theirs.path) == (DIRECT_AT_LAST, DIRECT_AT_LAST)
        assert all(pipe.is_closed for pipe in pair.pipes)


async def test_connection_that_is_not_open_cannot_be_moved() -> None:
    async with relayed_pair() as pair, relayed_pair() as elsewhere:
        errors, accepted = await move(pair.one, elsewhere.ours, pair.other)
        assert "does not follow" in str(errors[0])
        assert "wants to move a connection that is not open" in str(accepted)
        assert pair.ours.path == RELAYED


async def test_somebody_elses_connection_cannot_be_moved_even_by_one_who_knows_its_hash() -> None:
    async with relayed_pair() as pair:
        thief = Upgrader(STRANGER, DEFAULT_CONFIG)
        stolen, _, _ = await connect(thief, pair.other, OTHER, RELAYED)
        assert isinstance(stolen, MuxConnection)
        stolen.handshake_hash = pair.ours.handshake_hash
        errors, accepted = await move(thief, stolen, pair.other)
        assert "does not follow" in str(errors[0])
        assert isinstance(accepted, ConnectionLost)
        assert pair.theirs.path == RELAYED


async def test_the_listener_of_a_connection_does_not_lead_it() -> None:
    async with relayed_pair() as pair:
        errors, accepted = await move(pair.other, pair.theirs, pair.one)
        assert errors
        assert isinstance(accepted, ConnectionLost)
        assert (pair.ours.path, pair.theirs.path) == (RELAYED, RELAYED)


async def read_exactly(stream: object, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        data += await stream.read(num_bytes - len(data))
    return data
