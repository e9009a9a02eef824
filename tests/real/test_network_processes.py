"""What happens to a node whose peer, in another process, hangs, dies or stalls."""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio

from p2pswarm.core.errors import ConnectionLost, PeerUnreachable
from p2pswarm.core.ids import PeerId
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Network
from p2pswarm.testing.network_contract import COLLECT, ECHO, HOLD, read_all, read_exactly

pytestmark = pytest.mark.real
PEER_PROGRAM = Path(__file__).with_name("network_peer.py")
STARTUP_S = 30


@contextlib.asynccontextmanager
async def peer_process() -> AsyncIterator[tuple[int, str]]:
    """A running `network_peer.py`: its process id and its address."""
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, str(PEER_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                check=False,
            )
        )
        try:
            with trio.fail_after(STARTUP_S):
                line = await process.stdout.receive_some(1000)
            yield process.pid, line.decode().strip()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


@contextlib.asynccontextmanager
async def connected_to(address: str) -> AsyncIterator[tuple[Network, PeerId]]:
    async with open_network(Identity.generate()) as network:
        yield network, await network.connect(address)


@pytest.mark.slow
async def test_stopped_peer_is_noticed_within_30_seconds() -> None:
    async with peer_process() as (pid, address), connected_to(address) as (network, peer_id):
        stream = await network.open_stream(peer_id, HOLD)
        await trio.sleep(1)
        os.kill(pid, signal.SIGSTOP)
        started_s = trio.current_time()
        with trio.fail_after(30), pytest.raises(ConnectionLost):
            await stream.read()
        assert trio.current_time() - started_s > 5, "a pause of a few seconds must not end a connection"
        assert network.connected_peers == frozenset()
        os.kill(pid, signal.SIGCONT)
        again = await network.open_stream(peer_id, ECHO)
        await again.write(b"awake")
        assert await read_exactly(again, 5) == b"awake"


async def test_peer_stopped_for_a_moment_is_kept() -> None:
    async with peer_process() as (pid, address), connected_to(address) as (network, peer_id):
        stream = await network.open_stream(peer_id, ECHO)
        os.kill(pid, signal.SIGSTOP)
        await stream.write(b"for later")
        await trio.sleep(2)
        os.kill(pid, signal.SIGCONT)
        assert await read_exactly(stream, 9) == b"for later"


async def test_killed_peer_is_noticed_at_once() -> None:
    async with peer_process() as (pid, address), connected_to(address) as (network, peer_id):
        stream = await network.open_stream(peer_id, HOLD)
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(2):
            with pytest.raises(ConnectionLost):
                await stream.read()
            with pytest.raises(ConnectionLost):
                await stream.write(b"anyone?")
            with pytest.raises(PeerUnreachable):
                await network.open_stream(peer_id, ECHO)


@pytest.mark.slow
async def test_reader_that_stalls_for_8_seconds_gets_everything() -> None:
    data = random.Random(31).randbytes(32 << 20)
    async with peer_process() as (_, address), connected_to(address) as (network, peer_id):
        stream = await network.open_stream(peer_id, COLLECT)
        with trio.fail_after(40):
            await stream.write(data)
            await stream.close_write()
            answer = await read_all(stream)
        assert int.from_bytes(answer[:8], "big") == len(data)
        assert answer[8:] == data[:1000] + data[-1000:]


async def test_peer_that_takes_no_handshake_is_given_up() -> None:
    async with peer_process() as (pid, address), open_network(Identity.generate()) as network:
        os.kill(pid, signal.SIGSTOP)
        with trio.fail_after(10), pytest.raises(PeerUnreachable):
            await network.connect(address)
