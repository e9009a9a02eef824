"""What every `net.network.Network` promises, as checks that run against any: the real one, the simulated one, yours.

Each check is an async function that takes a `Nodes`, opens what nodes it needs, and fails by an assertion.

    @pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
    async def test_network_keeps_the_contract(check):
        await check(Nodes(open_node=...))
"""

import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import trio
import trio.testing

from p2pswarm.core.errors import ConfigError, ConnectionLost, PeerUnreachable, ProtocolViolation, SwarmingError
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.identity import Identity, verify_signature
from p2pswarm.net.network import Network, Stream
from p2pswarm.net.path import ConnectionPath

ECHO = ProtocolId("/contract/echo/1")
COLLECT = ProtocolId("/contract/collect/1")
HOLD = ProtocolId("/contract/hold/1")
DEADLINE_S = 60.0
"""Of one check, in the time of the network under test; a machine under load may need a few seconds for some."""
NUMBER_BYTES = 4


@dataclass(frozen=True)
class Nodes:
    """How the checks get their nodes."""

    open_node: Callable[[], AbstractAsyncContextManager[Network]]
    """A new node with a key of its own, that listens."""
    longest_wait_s: float = 0.1
    """Random cancellations come after up to this long: about the time that a message takes."""


Check = Callable[[Nodes], Awaitable[None]]
CONTRACT: list[Check] = []
"""All the checks, in the order in which a new implementation might want to pass them."""


def in_contract(check: Check) -> Check:
    async def with_deadline(nodes: Nodes) -> None:
        with trio.fail_after(DEADLINE_S):
            await check(nodes)

    with_deadline.__name__ = check.__name__
    CONTRACT.append(with_deadline)
    return with_deadline


async def echo(stream: Stream) -> None:
    """A handler that sends back what comes, until the peer closes its side."""
    while data := await stream.read():
        await stream.write(data)


async def hold(stream: Stream) -> None:
    """A handler that neither reads nor writes nor ends."""
    await trio.sleep_forever()


class Collector:
    """A handler that keeps what comes on each stream, under the number that the stream starts with."""

    def __init__(self) -> None:
        self.received: dict[int, bytearray] = {}
        self.ended: dict[int, trio.Event] = {}

    def expect(self, number: int) -> bytes:
        """Prepares for a stream; returns what it must start with."""
        self.received[number] = bytearray()
        self.ended[number] = trio.Event()
        return number.to_bytes(NUMBER_BYTES, "big")

    async def __call__(self, stream: Stream) -> None:
        number = int.from_bytes(await read_exactly(stream, NUMBER_BYTES), "big")
        try:
            while data := await stream.read():
                self.received[number] += data
        finally:
            self.ended[number].set()


async def read_exactly(stream: Stream, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        more = await stream.read(num_bytes - len(data))
        assert more, f"the stream ended after {len(data)} of {num_bytes} bytes"
        data += more
    return bytes(data)


async def read_all(stream: Stream) -> bytes:
    data = bytearray()
    while more := await stream.read():
        data += more
    return bytes(data)


async def raises(error: type[SwarmingError], function: Callable[[], Awaitable[object]]) -> SwarmingError:
    """Asserts that `function` raises `error`, and returns what it raised."""
    try:
        result = await function()
    except error as raised:
        return raised
    raise AssertionError(f"wanted {error.__name__}, got the result {result!r}")


async def eventually(claim: Callable[[], bool]) -> None:
    """Returns when `claim` holds; the check's deadline ends a wait for what never comes."""
    while not claim():  # noqa: ASYNC110 - what a check claims sets no event
        await trio.sleep(0.01)


@in_contract
async def what_is_written_comes_back_from_an_echo(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(ECHO, echo)
        assert await alice.connect(bob.addresses[0]) == bob.peer_id
        stream = await alice.open_stream(bob.peer_id, ECHO)
        await stream.write(b"one", bytearray(b" two"), memoryview(b" three"))
        assert await read_exactly(stream, 13) == b"one two three"


@in_contract
async def both_ends_know_the_other_and_the_protocol(nodes: Nodes) -> None:
    seen: list[tuple[PeerId, ProtocolId]] = []

    async def note(stream: Stream) -> None:
        seen.append((stream.peer_id, stream.protocol))

    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(ECHO, note)
        await alice.connect(bob.addresses[0])
        stream = await alice.open_stream(bob.peer_id, ECHO)
        assert (stream.peer_id, stream.protocol) == (bob.peer_id, ECHO)
        await eventually(lambda: seen == [(alice.peer_id, ECHO)])


@in_contract
async def either_side_opens_streams_over_one_connection(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        alice.serve(ECHO, echo)
        await alice.connect(bob.addresses[0])
        await eventually(lambda: alice.peer_id in bob.connected_peers)
        stream = await bob.open_stream(alice.peer_id, ECHO)
        await stream.write(b"back")
        assert await read_exactly(stream, 4) == b"back"


@in_contract
async def a_large_write_arrives_whole_and_in_order(nodes: Nodes) -> None:
    data = random.Random(1).randbytes(5_000_000)
    collector = Collector()
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(COLLECT, collector)
        await alice.connect(bob.addresses[0])
        stream = await alice.open_stream(bob.peer_id, COLLECT)
        await stream.write(collector.expect(0))
        await stream.write(data[:70_000], b"", data[70_000:70_001], data[70_001:])
        await stream.close_write()
        await collector.ended[0].wait()
        assert bytes(collector.received[0]) == data


@in_contract
async def a_buffer_may_change_once_write_has_returned(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(ECHO, echo)
        await alice.connect(bob.addresses[0])
        stream = await alice.open_stream(bob.peer_id, ECHO)
        for size in (100, 200_000):
            buffer = bytearray(b"a" * size)
            await stream.write(memoryview(buffer))
            buffer[:] = b"b" * size
            assert await read_exactly(stream, size) == b"a" * size


@in_contract
async def a_read_gives_at_most_what_was_asked_for(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(ECHO, echo)
        await alice.connect(bob.addresses[0])
        stream = await alice.open_stream(bob.peer_id, ECHO)
        await stream.write(b"abcdef")
        assert [await stream.read(1) for _ in range(6)] == [b"a", b"b", b"c", b"d", b"e", b"f"]


@in_contract
async def closing_one_side_leaves_the_other_open(nodes: Nodes) -> None:
    async def answer_after_the_end(stream: Stream) -> None:
        request = await read_all(stream)
        await stream.write(b"got " + request)

    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(ECHO, answer_after_the_end)
        await alice.connect(bob.addresses[0])
        stream = await alice.open_stream(bob.peer_id, ECHO)
        await stream.write(b"all of it")
        await stream.close_write()
        assert await read_all(stream) == b"got all of it"
        assert await stream.read() == b""
        await raises(ConnectionLost, lambda: stream.write(b"more"))


@in_contract
async def what_a_handler_wrote_arrives_though_it_left_much_unread(nodes: Nodes) -> None:
    async def refuse(stream: Stream) -> None:
        await stream.read(1)
        await stream.write(b"no, thank you")

    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(ECHO, refuse)
        await alice.connect(bob.addresses[0])
        stream = await alice.open_stream(bob.peer_id, ECHO)
        await stream.write(b"x" * 100_000)
        assert await read_all(stream) == b"no, thank you"


@in_contract
async def a_handler_that_raises_resets_its_stream_only(nodes: Nodes) -> None:
    async def fail(stream: Stream) -> None:
        raise ConnectionLost("the handler gives up")

    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(HOLD, fail)
        bob.serve(ECHO, echo)
        await alice.connect(bob.addresses[0])
        healthy = await alice.open_stream(bob.peer_id, ECHO)
        failing = await alice.open_stream(bob.peer_id, HOLD)
        await raises(ConnectionLost, failing.read)
        await healthy.write(b"still here")
        assert await read_exactly(healthy, 10) == b"still here"


@in_contract
async def a_reset_wakes_readers_at_both_ends(nodes: Nodes) -> None:
    ended = trio.Event()

    async def wait_for_the_end(stream: Stream) -> None:
        await raises(ConnectionLost, stream.read)
        ended.set()

    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(HOLD, wait_for_the_end)
        await alice.connect(bob.addresses[0])
        stream = await alice.open_stream(bob.peer_id, HOLD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raises, ConnectionLost, stream.read)
            await trio.testing.wait_all_tasks_blocked()
            stream.reset()
            stream.reset()
        await ended.wait()
        await raises(ConnectionLost, stream.read)
        await raises(ConnectionLost, lambda: stream.write(b"late"))


@in_contract
async def a_reset_wakes_a_blocked_writer(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(HOLD, hold)
        await alice.connect(bob.addresses[0])
        stream = await alice.open_stream(bob.peer_id, HOLD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raises, ConnectionLost, lambda: stream.write(bytes(64 << 20)))
            await trio.sleep(0.5)
            stream.reset()


@in_contract
async def a_writer_waits_for_a_reader_who_takes_his_time(nodes: Nodes) -> None:
    data = random.Random(2).randbytes(24 << 20)
    is_written = False
    may_read = trio.Event()
    received = bytearray()
    ended = trio.Event()

    async def read_late(stream: Stream) -> None:
        await may_read.wait()
        while more := await stream.read():
            received.extend(more)
        ended.set()

    async def write() -> None:
        nonlocal is_written
        await stream.write(data)
        is_written = True
        await stream.close_write()

    async with nodes.open_node() as alice, nodes.open_node() as bob, trio.open_nursery() as nursery:
        bob.serve(COLLECT, read_late)
        bob.serve(ECHO, echo)
        await alice.connect(bob.addresses[0])
        stream = await alice.open_stream(bob.peer_id, COLLECT)
        nursery.start_soon(write)
        await trio.sleep(2)
        assert not is_written, "24 MiB were taken from the writer with nobody to read them"
        other = await alice.open_stream(bob.peer_id, ECHO)
        await other.write(b"not held up")
        assert await read_exactly(other, 11) == b"not held up"
        may_read.set()
        await ended.wait()
        assert received == data


@in_contract
async def cancelled_reads_lose_nothing(nodes: Nodes) -> None:
    await cancel_reads(nodes, num_cancellations=50, seed=3)


async def cancel_reads(nodes: Nodes, num_cancellations: int, seed: int) -> None:
    """Reads an echo under random cancellations until there were enough, and compares every byte."""
    randomness = random.Random(seed)
    sent = bytearray()
    received = bytearray()
    num_cancelled = 0

    async def write() -> None:
        while num_cancelled < num_cancellations:
            data = randomness.randbytes(randomness.randrange(1, 20_000))
            sent.extend(data)
            await stream.write(data)
            await trio.sleep(randomness.uniform(0, nodes.longest_wait_s))
        await stream.close_write()

    async with nodes.open_node() as alice, nodes.open_node() as bob, trio.open_nursery() as nursery:
        bob.serve(ECHO, echo)
        await alice.connect(bob.addresses[0])
        stream = await alice.open_stream(bob.peer_id, ECHO)
        nursery.start_soon(write)
        while True:
            with trio.move_on_after(randomness.uniform(0, nodes.longest_wait_s)) as scope:
                more = await stream.read(randomness.randrange(1, 30_000))
                if not more:
                    break
                received += more
            num_cancelled += scope.cancelled_caught
    assert received == sent


@in_contract
async def a_cancelled_write_costs_at_most_the_tail_of_its_stream(nodes: Nodes) -> None:
    await cancel_writes(nodes, num_cancellations=50, seed=4)


async def cancel_writes(nodes: Nodes, num_cancellations: int, seed: int) -> None:
    """Cancels writes until enough were, beside streams left in peace: those are exact, these exact so far."""
    randomness = random.Random(seed)
    collector = Collector()
    sent: dict[int, bytearray] = {}
    whole: set[int] = set()
    num_cancelled = 0

    async def write_until_cancelled(alice: Network, bob: PeerId) -> None:
        nonlocal num_cancelled
        while num_cancelled < num_cancellations:
            number = len(sent)
            sent[number] = bytearray()
            stream = await alice.open_stream(bob, COLLECT)
            await stream.write(collector.expect(number))
            with trio.CancelScope() as scope:
                for _ in range(randomness.randrange(1, 20)):
                    data = randomness.randbytes(randomness.randrange(1, 400_000))
                    sent[number] += data
                    scope.deadline = trio.current_time() + randomness.uniform(0, nodes.longest_wait_s)
                    await stream.write(data)
                scope.deadline = float("inf")
                await stream.close_write()
                whole.add(number)
            num_cancelled += scope.cancelled_caught
            if scope.cancelled_caught:
                stream.reset()

    async with nodes.open_node() as alice, nodes.open_node() as bob, trio.open_nursery() as healthy:
        bob.serve(COLLECT, collector)
        bob.serve(ECHO, echo)
        await alice.connect(bob.addresses[0])
        are_done = trio.Event()
        healthy.start_soon(_exchange_until, alice, bob.peer_id, are_done)
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(write_until_cancelled, alice, bob.peer_id)
        are_done.set()
        for ended in collector.ended.values():
            await ended.wait()
    for number, data in sent.items():
        received = collector.received[number]
        assert data.startswith(received), f"stream {number} got bytes that were not written"
        assert number not in whole or len(received) == len(data), f"stream {number} lost bytes, undisturbed as it was"


async def _exchange_until(network: Network, peer_id: PeerId, are_done: trio.Event) -> None:
    stream = await network.open_stream(peer_id, ECHO)
    randomness = random.Random(5)
    while not are_done.is_set():
        data = randomness.randbytes(5_000)
        await stream.write(data)
        assert await read_exactly(stream, len(data)) == data
        await trio.sleep(0.001)
    stream.reset()


@in_contract
async def a_cancelled_opening_leaves_the_connection_usable(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(ECHO, echo)
        await alice.connect(bob.addresses[0])
        randomness = random.Random(6)
        for _ in range(30):
            with trio.move_on_after(randomness.uniform(0, nodes.longest_wait_s)):
                (await alice.open_stream(bob.peer_id, ECHO)).reset()
        stream = await alice.open_stream(bob.peer_id, ECHO)
        await stream.write(b"fine")
        assert await read_exactly(stream, 4) == b"fine"


@in_contract
async def many_streams_live_side_by_side(nodes: Nodes) -> None:
    await open_many_streams(nodes, num_streams=200)


async def open_many_streams(nodes: Nodes, num_streams: int) -> None:
    """Opens streams without closing any, then uses each of them."""
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(ECHO, echo)
        await alice.connect(bob.addresses[0])
        streams = [await alice.open_stream(bob.peer_id, ECHO) for _ in range(num_streams)]

        async def use(number: int, stream: Stream) -> None:
            data = number.to_bytes(NUMBER_BYTES, "big") * 1000
            await stream.write(data)
            await stream.close_write()
            assert await read_all(stream) == data

        async with trio.open_nursery() as nursery:
            for number, stream in enumerate(streams):
                nursery.start_soon(use, number, stream)


@in_contract
async def streams_opened_at_the_same_time_share_one_dial(nodes: Nodes) -> None:
    connections: set[int] = set()
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(ECHO, echo)
        alice.add_addresses(bob.peer_id, bob.addresses)
        before = alice.connected_peers

        async def use() -> None:
            stream = await alice.open_stream(bob.peer_id, ECHO)
            await stream.write(b"hello")
            assert await read_exactly(stream, 5) == b"hello"
            connections.add(len(alice.connected_peers - before))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(use)
        assert connections == {1}


@in_contract
async def a_protocol_nobody_serves_is_a_violation_and_no_more(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(ECHO, echo)
        await alice.connect(bob.addresses[0])
        error = await raises(ProtocolViolation, lambda: alice.open_stream(bob.peer_id, ProtocolId("/unknown/1")))
        assert "/unknown/1" in str(error)
        await alice.open_stream(bob.peer_id, ECHO)


@in_contract
async def peers_that_cannot_be_reached_are_told_apart_from_bad_addresses(nodes: Nodes) -> None:
    stranger = Identity.generate().peer_id
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        await raises(PeerUnreachable, lambda: alice.open_stream(stranger, ECHO))
        alice.add_addresses(stranger, ["rubbish", "/ip4/1.2.3.4/udp/1", "/ip4/0.0.0.0/tcp/9"])
        await raises(PeerUnreachable, lambda: alice.open_stream(stranger, ECHO))
        wrong_key = bob.addresses[0].replace(bob.peer_id, stranger)
        await raises(PeerUnreachable, lambda: alice.connect(wrong_key))
        await raises(PeerUnreachable, lambda: alice.connect(alice.addresses[0]))
        for malformed in ("", "rubbish", "/ip4/1.2.3.4/tcp/1", f"/ip4/1.2.3/tcp/1/p2p/{stranger}"):
            await raises(ConfigError, lambda address=malformed: alice.connect(address))  # type: ignore[misc]
        assert await alice.connect(bob.addresses[0]) == bob.peer_id


@in_contract
async def disconnecting_ends_the_streams_at_both_ends(nodes: Nodes) -> None:
    ended = trio.Event()

    async def wait_for_the_end(stream: Stream) -> None:
        await raises(ConnectionLost, stream.read)
        ended.set()

    async with nodes.open_node() as alice, nodes.open_node() as bob:
        bob.serve(HOLD, wait_for_the_end)
        bob.serve(ECHO, echo)
        await alice.connect(bob.addresses[0])
        stream = await alice.open_stream(bob.peer_id, HOLD)
        assert bob.peer_id in alice.connected_peers
        await alice.disconnect(bob.peer_id)
        await raises(ConnectionLost, stream.read)
        await ended.wait()
        assert bob.peer_id not in alice.connected_peers
        await eventually(lambda: alice.peer_id not in bob.connected_peers)
        await alice.disconnect(bob.peer_id)
        again = await alice.open_stream(bob.peer_id, ECHO)
        await again.write(b"back")
        assert await read_exactly(again, 4) == b"back"


@in_contract
async def a_node_that_leaves_is_noticed_at_once(nodes: Nodes) -> None:
    async with nodes.open_node() as alice:
        async with nodes.open_node() as bob:
            bob.serve(HOLD, hold)
            await alice.connect(bob.addresses[0])
            stream = await alice.open_stream(bob.peer_id, HOLD)
        with trio.fail_after(5):
            await raises(ConnectionLost, stream.read)
            await eventually(lambda: bob.peer_id not in alice.connected_peers)
        await raises(PeerUnreachable, lambda: alice.open_stream(bob.peer_id, HOLD))


@in_contract
async def signatures_are_checked_with_the_peer_id_alone(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        signature = alice.sign(b"data")
        assert verify_signature(alice.peer_id, b"data", signature)
        assert not verify_signature(alice.peer_id, b"Data", signature)
        assert not verify_signature(bob.peer_id, b"data", signature)


@in_contract
async def addresses_end_with_the_peer_id_and_round_trips_are_measured(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        assert bob.addresses
        assert all(address.endswith(f"/p2p/{bob.peer_id}") for address in bob.addresses)
        assert alice.round_trip_s(bob.peer_id) is None
        await alice.connect(bob.addresses[0])
        await eventually(lambda: alice.round_trip_s(bob.peer_id) is not None)


@in_contract
async def published_addresses_stand_for_the_own_ones_until_they_are_withdrawn(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        own = alice.addresses
        alice.publish(["/ip4/192.0.2.1/tcp/4001", f"/ip4/192.0.2.2/tcp/4002/p2p/{alice.peer_id}"])
        assert alice.addresses == (
            f"/ip4/192.0.2.1/tcp/4001/p2p/{alice.peer_id}",
            f"/ip4/192.0.2.2/tcp/4002/p2p/{alice.peer_id}",
        )
        circuit = f"{bob.addresses[0]}/p2p-circuit/p2p/{alice.peer_id}"
        alice.publish([circuit])
        assert list(alice.addresses) == [circuit]
        alice.publish([])
        assert not alice.addresses
        alice.publish(None)
        assert alice.addresses == own


@in_contract
async def the_path_to_a_peer_is_known_while_there_is_a_connection(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        assert alice.path(bob.peer_id) is None
        await alice.connect(bob.addresses[0])
        assert alice.path(bob.peer_id) == ConnectionPath(remote=bob.own_listen_addresses()[0])
        await alice.disconnect(bob.peer_id)
        assert alice.path(bob.peer_id) is None


@in_contract
async def a_lane_comes_to_who_expects_it_and_to_nobody_else(nodes: Nodes) -> None:
    async with nodes.open_node() as relay, nodes.open_node() as end:
        await end.connect(relay.addresses[0])
        with relay.expect_lane() as expected:
            strange = await end.open_lane(relay.peer_id, bytes(len(expected.ticket)))
            assert await strange.receive_some(1) == b""
            ours = await end.open_lane(relay.peer_id, expected.ticket)
            await expected.has_come.wait()
            assert expected.lane is not None
            assert ours.path == ConnectionPath(relay=relay.peer_id)
            await ours.send_all(b"there")
            assert await expected.lane.read(100) == b"there"
            await expected.lane.write(b"and back")
            assert await ours.receive_some(100) == b"and back"
        assert await ours.receive_some(1) == b""
        await strange.aclose()
        await ours.aclose()


@in_contract
async def a_fresh_dial_tells_whether_the_peer_answers_there_and_leaves_no_connection(nodes: Nodes) -> None:
    async with nodes.open_node() as alice, nodes.open_node() as bob:
        address = bob.own_listen_addresses()[0]
        await alice.dial_fresh(address, bob.peer_id)
        await eventually(lambda: not alice.connected_peers and not bob.connected_peers)
        await raises(ConnectionLost, lambda: alice.dial_fresh(address, alice.peer_id))
        await alice.connect(bob.addresses[0])
        nowhere = TcpAddress(address.kind, address.host, 1)
        await raises(ConnectionLost, lambda: alice.dial_fresh(nowhere, bob.peer_id))
        assert alice.connected_peers == {bob.peer_id}
