"""Many streams over one secured connection: `/p2pswarm/mux/1.0.0`, yamux's framing with rules of our own on top.

Theory of operation. Three tasks own everything that waits for the wire, and nobody ever cancels them one by one: a
reader, a writer that sends all that has gathered since its last write in one go, and a keep-alive. Whoever opens,
reads or writes a stream only changes memory and wakes them, so a caller may be cancelled at any moment without harm
to the connection. A short message with nothing before it goes to the socket at once, without waiting either; what
the socket does not take is the writer's. That saves a round trip two changes of task, a fifth of its time.

What a peer can make us hold is bounded:

- data: by each stream's window, which grows only out of a budget shared by the connection; and when our readers leave
  too much unread in all its streams, or in all connections together, we stop reading from it;
- streams: by a number; more are refused, and ids may only rise, so that closed ones need no memory;
- answers to it (pings, refusals): when too many wait, because it does not read, we stop reading from it;
- window updates: one per stream at most waits, as a mark on the stream.

A connection can move to another transport between the same two nodes, from a relay's circuit to a direct connection,
under its open streams: `mux_transports.py` says how.

Who breaks the rules gets a go-away with a code, and this connection ends; no other does. See
`docs/protocol-transport.md`.
"""

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from p2pswarm.core.errors import ConnectionLost, NetworkError, ProtocolViolation
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.config import DEFAULT_CONFIG, NetworkConfig
from p2pswarm.net.mux_frames import (
    ACK,
    FIN,
    INITIAL_WINDOW_BYTES,
    RST,
    SYN,
    Frame,
    FrameParser,
    FrameType,
    GoAwayCode,
    encode_header,
)
from p2pswarm.net.mux_stream import MuxStream
from p2pswarm.net.mux_transports import SecureTransport, Transports
from p2pswarm.net.path import DIRECT, ConnectionPath
from p2pswarm.net.unread import UnreadBytes

MUX_PROTOCOL = ProtocolId("/p2pswarm/mux/1.0.0")

MAX_QUEUED_BYTES = 256 * 1024
"""Data that waits for the writer; more makes senders wait: a short message is never far behind a long one."""
GATHER_S = 0.001
"""Messages that follow each other faster wait for the writer, which sends them together: less work in all."""
MAX_QUEUED_ANSWER_BYTES = 64 * 1024
"""5,000 answers to pings and new streams. No honest peer lets so many gather unread."""
WOKEN_WRITERS = 8
"""Senders woken per batch: enough to fill the next one, without a thousand of them waking for nothing."""
GOODBYE_TIMEOUT_S = 1.0
"""What the peer gets to take our last bytes."""
MAX_STREAM_ID = (1 << 32) - 1
LEFT_TIMEOUT_S = 10.0
"""How long a listener that has moved waits for the dialler to close the old transport."""
GRANT_SHARE = 16
"""A new window takes one part in this many of the budget's rest: large for the first, fair to the last."""
MAX_FIRST_GRANT_BYTES = 4 * 1024 * 1024
ROUND_TRIPS_PER_WINDOW = 4
"""A reader that empties the window faster than this many round trips is held back by it: it doubles."""
MIN_ROUND_TRIP_S = 0.001
OVERFULL_POLL_S = 0.25
FREE_UNREAD_BYTES = 256 * 1024
"""A connection may leave so much unread however much the others do: one slow reader of another peer stops nobody."""
MAX_ROUND_TRIP_AGE_S = 60.0
"""A busy connection measures its round trip again after this long."""

logger = logging.getLogger(__name__)


class MuxConnection:
    """One connection to one peer; `run` is its life."""

    def __init__(
        self,
        transport: SecureTransport,
        peer_id: PeerId,
        path: ConnectionPath = DIRECT,
        *,
        is_initiator: bool,
        config: NetworkConfig = DEFAULT_CONFIG,
        handshake_hash: bytes = b"",
        unread: UnreadBytes | None = None,
    ) -> None:
        """`unread`: shared by the connections of a node; None: it has no others."""
        self.peer_id = peer_id
        self.is_initiator = is_initiator
        self.handshake_hash = handshake_hash
        """Of the handshake that it began with: by this its two ends mean the same connection."""
        self.round_trip_s: float | None = None
        self.broke_protocol = False
        self.idle_since_s: float | None = trio.current_time()
        self._transports = Transports(transport, path, peer_id, is_dialler=is_initiator)
        self._config = config
        self._next_stream_id = 1 if is_initiator else 2
        self._highest_peer_stream_id = 0
        self._num_peer_streams = 0
        self._streams: dict[int, MuxStream] = {}
        self._unaccepted: deque[MuxStream] = deque()
        self._acceptable = trio.Event()
        self._end: str | None = None
        self._ended = trio.Event()
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._growth_left_bytes = config.max_receive_bytes_per_connection // 2
        self._buffered_bytes = 0
        self._unread = UnreadBytes(config.max_receive_bytes) if unread is None else unread
        # what waits for the writer
        self._queue: list[bytes | memoryview] = []
        self._queued_bytes = 0
        self._answers = bytearray()
        self._updates: dict[int, MuxStream] = {}
        self._has_output = trio.Event()
        self._waiting_for_room = trio.lowlevel.ParkingLot()
        self._progress = trio.lowlevel.ParkingLot()
        self._is_writing = False
        self._has_rest = False
        """Whether `write_now` has left something for the writer."""
        self._last_sent_s = -math.inf
        # keep-alive
        self._last_received_s = trio.current_time()
        self._ping_sent_s: float | None = None
        self._ping_number = 0
        self._round_trip_measured_s = -MAX_ROUND_TRIP_AGE_S

    @property
    def path(self) -> ConnectionPath:
        return self._transports.path

    @property
    def is_closed(self) -> bool:
        return self._end is not None

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    # Opening and accepting

    async def open_stream(self) -> MuxStream:
        """A new stream, usable at once: the peer learns of it with the first bytes. Raises `ConnectionLost`."""
        self._raise_if_ended()
        if self._next_stream_id > MAX_STREAM_ID:
            raise ConnectionLost(f"the connection to {self.peer_id} has used up its stream ids", self.peer_id)
        stream = self._new_stream(self._next_stream_id)
        stream.is_taken_up = True
        self._next_stream_id += 2
        self._enqueue(encode_header(FrameType.WINDOW_UPDATE, SYN, stream.stream_id, _granted(stream)))
        return stream

    async def accept_stream(self) -> MuxStream | None:
        """The next stream that the peer has opened; None when the connection has ended."""
        await trio.lowlevel.checkpoint()
        while True:
            while self._unaccepted and self._unaccepted[0].is_finished:  # opened and reset: nobody asks for anything
                self._unaccepted.popleft()
            if self._unaccepted:
                break
            if self._end is not None:
                return None
            if self._acceptable.is_set():
                self._acceptable = trio.Event()
            await self._acceptable.wait()
        stream = self._unaccepted.popleft()
        stream.is_taken_up = True
        return stream

    def _new_stream(self, stream_id: int) -> MuxStream:
        growth = min(MAX_FIRST_GRANT_BYTES - INITIAL_WINDOW_BYTES, self._growth_left_bytes // GRANT_SHARE)
        self._growth_left_bytes -= growth
        self.idle_since_s = None
        stream = self._streams[stream_id] = MuxStream(self, stream_id, INITIAL_WINDOW_BYTES + growth)
        return stream

    # Life

    async def run(self) -> None:
        """Reads, writes and keeps alive until the connection ends, for whatever reason; raises only `Cancelled`."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._keep_alive)
        finally:
            self._finish("this node closed it")
            with trio.move_on_after(GOODBYE_TIMEOUT_S, shield=True):
                for transport in self._transports.in_use():
                    await transport.close()
            self._ended.set()

    async def close(self) -> None:
        """Lets what is queued go out, says good-bye and ends the connection."""
        with trio.CancelScope(shield=True):
            await self._say_goodbye(GoAwayCode.NORMAL)
            self._finish("it was closed here")
            await self._ended.wait()

    async def _say_goodbye(self, code: GoAwayCode) -> None:
        """Gives what is queued, and a last frame, a moment to go out."""
        self._enqueue(encode_header(FrameType.GO_AWAY, 0, 0, code))
        with trio.move_on_after(GOODBYE_TIMEOUT_S):
            while self._end is None and (self._is_writing or self._has_rest or self._queue):
                await self._progress.park()

    def _finish(self, why: str) -> None:
        """The end: wakes everyone who waits for anything."""
        if self._end is not None:
            return
        self._end = why
        logger.debug("connection to %s ended: %s", self.peer_id, why)
        self._scope.cancel()
        for stream in list(self._streams.values()):
            stream.break_off(f"the connection ended: {why}")
        self._unaccepted.clear()
        self._acceptable.set()
        self._progress.unpark_all()
        self._waiting_for_room.unpark_all()

    def _raise_if_ended(self) -> None:
        if self._end is not None:
            raise ConnectionLost(f"the connection to {self.peer_id} ended: {self._end}", self.peer_id)

    # Moving

    def move_to(self, transport: SecureTransport, path: ConnectionPath) -> None:
        """Goes on over `transport`, which was proven to lead to the same peer; streams notice nothing.

        The listener calls this first and tells the dialler, who calls it then. Takes over `transport`, unless it raises
        `ConnectionLost`: the connection has ended, or is in the middle of a move.
        """
        self._raise_if_ended()
        superseded = self._transports.begin(
            transport, replace(path, left_relay=self.path.relay or self.path.left_relay)
        )
        if superseded is not None:
            self._start(self._close, superseded)
        self._has_output.set()

    def _note_move(self) -> None:
        left = self._transports.take_left()
        if left is not None:
            logger.debug("the connection to %s moved, its path is %s now", self.peer_id, self.path)
            self._ping()  # for its new round trip
            self._start(self._leave, left)

    async def _leave(self, transport: SecureTransport) -> None:
        """Closes what nobody uses any more, the listener only when the dialler has: it may not have read our move."""
        try:
            if not self._transports.is_dialler:
                with trio.move_on_after(LEFT_TIMEOUT_S):
                    await transport.read_some()
        except (NetworkError, ProtocolViolation) as error:
            logger.debug("the transport to %s that was left ended: %s", self.peer_id, error)
        finally:
            await self._close(transport)

    async def _close(self, transport: SecureTransport) -> None:
        with trio.move_on_after(GOODBYE_TIMEOUT_S, shield=True):
            await transport.close()

    def _start(self, function: Callable[[SecureTransport], Awaitable[None]], transport: SecureTransport) -> None:
        assert self._nursery is not None, "a connection moves while it runs"
        self._nursery.start_soon(function, transport)

    # Writing

    async def _write(self) -> None:
        try:
            while True:
                batch = self._take_output()
                is_last = self._transports.has_to_leave
                if is_last:
                    batch.append(encode_header(FrameType.MOVE, 0, 0, 0))
                if not batch and not self._has_rest:
                    self._waiting_for_room.unpark_all()
                    self._has_output = trio.Event()
                    await self._has_output.wait()
                    continue
                self._waiting_for_room.unpark(count=WOKEN_WRITERS)
                self._is_writing, self._has_rest = True, False
                await self._transports.outgoing.write_all(batch)
                self._is_writing = False
                self._progress.unpark_all()
                if is_last:
                    self._transports.leave()
                    self._note_move()
        except NetworkError as error:
            self._finish(str(error))

    def _take_output(self) -> list[bytes | memoryview]:
        batch: list[bytes | memoryview] = []
        if self._answers:
            batch.append(bytes(self._answers))
            self._answers.clear()
        if self._updates:
            batch.extend(self._window_updates())
        batch += self._queue
        self._queue = []
        self._queued_bytes = 0
        return batch

    def _window_updates(self) -> list[bytes]:
        frames = []
        for stream_id, stream in self._updates.items():
            stream.receive_credit_bytes += stream.unacknowledged_bytes
            frames.append(encode_header(FrameType.WINDOW_UPDATE, 0, stream_id, stream.unacknowledged_bytes))
            stream.unacknowledged_bytes = 0
        self._updates.clear()
        return frames

    def _enqueue(self, *buffers: bytes | memoryview) -> None:
        self._queue += buffers
        self._queued_bytes += sum(map(len, buffers))
        self._has_output.set()

    def _send_now_or_enqueue(self, *buffers: bytes | memoryview) -> None:
        """The first message after a pause goes out at once, those that follow it closely go out together."""
        now_s = trio.current_time()
        is_first = now_s - self._last_sent_s > GATHER_S
        self._last_sent_s = now_s
        if not is_first or self._is_writing or self._has_rest or self._queue or self._answers or self._updates:
            self._enqueue(*buffers)
            return
        try:
            self._has_rest = not self._transports.outgoing.write_now(buffers)
        except NetworkError as error:
            self._finish(str(error))
        if self._has_rest:
            self._has_output.set()

    def has_room(self) -> bool:
        return self._queued_bytes < MAX_QUEUED_BYTES

    async def wait_room(self) -> None:
        self._raise_if_ended()
        await self._waiting_for_room.park()

    def wake_waiting_for_room(self) -> None:
        self._waiting_for_room.unpark_all()

    # What streams ask for (`mux_stream.StreamOwner`)

    def send_data(self, stream: MuxStream, data: bytes | memoryview) -> None:
        self._send_now_or_enqueue(encode_header(FrameType.DATA, 0, stream.stream_id, len(data)), data)

    def send_fin(self, stream: MuxStream) -> None:
        self._enqueue(encode_header(FrameType.DATA, FIN, stream.stream_id, 0))

    def send_reset(self, stream: MuxStream) -> None:
        self._enqueue(encode_header(FrameType.WINDOW_UPDATE, RST, stream.stream_id, 0))

    def consumed(self, stream: MuxStream, num_bytes: int) -> None:
        if stream.stream_id not in self._streams:
            return
        self._discount(num_bytes)
        stream.unacknowledged_bytes += num_bytes
        if stream.unacknowledged_bytes >= stream.receive_window_bytes // 2:
            self._grow(stream)
            self._updates[stream.stream_id] = stream
            self._has_output.set()

    def _discount(self, num_bytes: int) -> None:
        was_overfull = self._is_overfull()
        self._buffered_bytes -= num_bytes
        self._unread.num_bytes -= num_bytes
        if was_overfull:
            self._last_received_s = trio.current_time()
            self._progress.unpark_all()

    def _grow(self, stream: MuxStream) -> None:
        """Doubles the window of a stream that is read as fast as the peer may send."""
        now_s = trio.current_time()
        round_trip_s = max(self.round_trip_s or MIN_ROUND_TRIP_S, MIN_ROUND_TRIP_S)
        is_held_back = now_s - stream.last_update_s < round_trip_s * ROUND_TRIPS_PER_WINDOW
        stream.last_update_s = now_s
        window_bytes = min(2 * stream.receive_window_bytes, self._config.max_stream_window_bytes)
        growth = min(window_bytes - stream.receive_window_bytes, self._growth_left_bytes)
        if is_held_back and growth > 0:
            self._growth_left_bytes -= growth
            stream.receive_window_bytes += growth
            stream.unacknowledged_bytes += growth

    def finished(self, stream: MuxStream) -> None:
        if self._streams.pop(stream.stream_id, None) is None:
            return
        self._updates.pop(stream.stream_id, None)
        self._discount(stream.buffered_bytes)
        self._growth_left_bytes += stream.receive_window_bytes - INITIAL_WINDOW_BYTES
        if self._is_peers(stream.stream_id):
            self._num_peer_streams -= 1
        if not self._streams:
            self.idle_since_s = trio.current_time()

    def _is_peers(self, stream_id: int) -> bool:
        return stream_id % 2 != self._next_stream_id % 2

    # Reading

    async def _read(self) -> None:
        parser = FrameParser()
        try:
            while data := await self._transports.incoming.read_some():
                self._last_received_s = trio.current_time()
                for frame in parser.feed(data):
                    self._handle(frame)
                if parser.is_over:
                    parser = FrameParser()
                while self._is_overfull() or self._is_owed_too_much():
                    with trio.move_on_after(OVERFULL_POLL_S):  # other connections tell this one nothing
                        await self._progress.park()
            self._finish("the peer closed it")
        except ProtocolViolation as error:
            logger.warning("%s broke the protocol, its connection is closed: %s", self.peer_id, error)
            self.broke_protocol = True
            await self._say_goodbye(GoAwayCode.PROTOCOL_ERROR)
            self._finish(f"the peer broke the protocol: {error}")
        except NetworkError as error:
            self._finish(str(error))

    def _is_overfull(self) -> bool:
        """Our readers leave so much unread, here or in all connections, that no more is taken from the peer."""
        most_bytes = FREE_UNREAD_BYTES if self._unread.is_too_much else self._config.max_receive_bytes_per_connection
        return self._buffered_bytes > most_bytes

    def _is_owed_too_much(self) -> bool:
        """The peer asks for answers and does not take them."""
        return len(self._answers) > MAX_QUEUED_ANSWER_BYTES or self._queued_bytes > 2 * MAX_QUEUED_BYTES

    def _handle(self, frame: Frame) -> None:
        match frame.type:
            case FrameType.DATA | FrameType.WINDOW_UPDATE:
                self._handle_stream_frame(frame)
            case FrameType.PING:
                self._handle_ping(frame)
            case FrameType.MOVE:
                self._transports.arrive()
                self._note_move()
                self._has_output.set()
            case _:
                raise ConnectionLost(f"the peer said good-bye with code {frame.length}", self.peer_id)

    def _handle_ping(self, frame: Frame) -> None:
        if frame.flags & SYN:
            self._answer(encode_header(FrameType.PING, ACK, 0, frame.length))
        elif frame.flags & ACK and self._ping_sent_s is not None and frame.length == self._ping_number:
            now_s = trio.current_time()
            self.round_trip_s = now_s - self._ping_sent_s
            self._round_trip_measured_s = now_s
            self._ping_sent_s = None

    def _handle_stream_frame(self, frame: Frame) -> None:
        if frame.flags & SYN:
            self._handle_syn(frame.stream_id)
        stream = self._streams.get(frame.stream_id)
        if stream is None:
            self._check_was_open(frame.stream_id)
            return
        if frame.type == FrameType.DATA:
            stream.receive(frame.payload)
            self._buffered_bytes += frame.length
            self._unread.num_bytes += frame.length
        else:
            stream.widen(frame.length)
        if frame.flags & RST:
            stream.break_off("the peer reset it")
            if not stream.is_taken_up:
                stream.reset()  # nobody will read what it sent
        elif frame.flags & FIN:
            stream.peer_closes()

    def _handle_syn(self, stream_id: int) -> None:
        if not self._is_peers(stream_id) or stream_id <= self._highest_peer_stream_id:
            raise ProtocolViolation(f"{self.peer_id} opened stream {stream_id}, an id not its to use", self.peer_id)
        self._highest_peer_stream_id = stream_id
        if (
            self._num_peer_streams >= self._config.max_streams_per_connection
            or len(self._unaccepted) >= self._config.max_unaccepted_streams
        ):
            self._answer(encode_header(FrameType.WINDOW_UPDATE, RST, stream_id, 0))
            return
        self._num_peer_streams += 1
        stream = self._new_stream(stream_id)
        self._answer(encode_header(FrameType.WINDOW_UPDATE, ACK, stream_id, _granted(stream)))
        self._unaccepted.append(stream)
        self._acceptable.set()

    def _check_was_open(self, stream_id: int) -> None:
        """What comes for a stream that was closed here is dropped; for one that never was, it is a violation."""
        newest = self._highest_peer_stream_id if self._is_peers(stream_id) else self._next_stream_id - 2
        if stream_id > newest:
            raise ProtocolViolation(f"{self.peer_id} sent a frame for stream {stream_id}, never opened", self.peer_id)

    def _answer(self, frame: bytes) -> None:
        self._answers += frame
        self._has_output.set()

    # Keep-alive

    async def _keep_alive(self) -> None:
        config = self._config
        self._ping()
        while True:
            await trio.sleep_until(self._next_check_s())
            now_s = trio.current_time()
            silence_s = now_s - self._last_received_s
            if self._is_overfull():
                self._last_received_s = now_s
            elif self._ping_sent_s is not None and now_s >= self._next_check_s():
                self._finish(f"the peer gave no sign of life for {silence_s:.0f} s")
            elif silence_s >= config.ping_interval_s or now_s - self._round_trip_measured_s >= MAX_ROUND_TRIP_AGE_S:
                self._ping()

    def _next_check_s(self) -> float:
        if self._ping_sent_s is not None:
            return max(self._ping_sent_s, self._last_received_s) + self._config.ping_timeout_s
        return min(
            self._last_received_s + self._config.ping_interval_s, self._round_trip_measured_s + MAX_ROUND_TRIP_AGE_S
        )

    def _ping(self) -> None:
        self._ping_number = (self._ping_number + 1) & MAX_STREAM_ID
        self._ping_sent_s = trio.current_time()
        self._answer(encode_header(FrameType.PING, SYN, 0, self._ping_number))


def _granted(stream: MuxStream) -> int:
    return stream.receive_window_bytes - INITIAL_WINDOW_BYTES
