"""Bytes <-> frames of the muxer: the framing of the yamux specification, sans-IO.

A frame is a header of 12 bytes, big endian: version (0), type, flags (16 bits), stream id (32 bits), length (32 bits).

    type 0 data           length bytes of payload follow
         1 window update  length is how much more the peer may send on this stream
         2 ping           length is a number that the answer (flag ACK) repeats; stream id 0
         3 go away        length is a `GoAwayCode`; stream id 0
         4 move           the last frame on this transport: the connection goes on over another; stream id 0
    flags: 1 SYN opens a stream, 2 ACK accepts it, 4 FIN closes the sender's side, 8 RST ends it at once

Payloads are handed out as they come, never gathered, so that the parser holds less than one header whatever a peer
sends. What frames mean is decided in `net/mux_connection.py`.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from p2pswarm.core.errors import ProtocolViolation

HEADER = struct.Struct("!BBHII")
VERSION = 0
INITIAL_WINDOW_BYTES = 256 * 1024
"""What either side may send on a new stream before any window update; fixed by the specification."""
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024
"""No window is larger, so no honest data frame is longer."""


MIN_VIEW_BYTES = 4096


class FrameType(IntEnum):
    DATA = 0
    WINDOW_UPDATE = 1
    PING = 2
    GO_AWAY = 3
    MOVE = 4


SYN, ACK, FIN, RST = 1, 2, 4, 8
ALL_FLAGS = SYN | ACK | FIN | RST


class GoAwayCode(IntEnum):
    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class Frame(NamedTuple):
    """A frame, or a piece of a data frame: the first piece has the flags SYN and ACK, the last one FIN and RST."""

    type: int
    flags: int
    stream_id: int
    length: int
    payload: bytes | memoryview = b""


def encode_header(type: FrameType, flags: int, stream_id: int, length: int) -> bytes:
    return HEADER.pack(VERSION, type, flags, stream_id, length)


class FrameParser:
    """Cuts what arrives into frames. Raises `ProtocolViolation` at what cannot be right, and is useless then."""

    def __init__(self) -> None:
        self.is_over = False
        """Whether a move has come: these bytes have an end, and others elsewhere go on."""
        self._partial_header = b""
        self._stream_id = 0
        self._closing_flags = 0
        self._payload_left = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames in `data`, which may begin and end anywhere."""
        if self._partial_header:
            data = self._partial_header + data
            self._partial_header = b""
        start = 0
        while True:
            if self.is_over:
                if start < len(data):
                    raise ProtocolViolation(f"{len(data) - start} bytes came after the move that was the last frame")
                return
            if self._payload_left:
                if start == len(data):
                    return
                end = min(len(data), start + self._payload_left)
                yield self._payload_piece(data, start, end, 0)
                start = end
                continue
            if len(data) - start < HEADER.size:
                self._partial_header = data[start:]
                return
            version, type, flags, stream_id, length = HEADER.unpack_from(data, start)
            start += HEADER.size
            _check(version, type, flags, stream_id, length)
            self.is_over = type == FrameType.MOVE
            if type != FrameType.DATA or not length:
                yield Frame(type, flags, stream_id, length)
                continue
            self._stream_id = stream_id
            self._closing_flags = flags & (FIN | RST)
            self._payload_left = length
            end = min(len(data), start + length)
            yield self._payload_piece(data, start, end, flags & (SYN | ACK))
            start = end

    def _payload_piece(self, data: bytes, start: int, end: int, flags: int) -> Frame:
        self._payload_left -= end - start
        if not self._payload_left:
            flags |= self._closing_flags
        # A view saves a copy, but holds all of `data`: only where that is not much more than the payload.
        is_most = end - start > len(data) // 2
        payload = memoryview(data)[start:end] if is_most and end - start >= MIN_VIEW_BYTES else data[start:end]
        return Frame(FrameType.DATA, flags, self._stream_id, end - start, payload)


def _check(version: int, type: int, flags: int, stream_id: int, length: int) -> None:
    if version != VERSION:
        raise ProtocolViolation(f"a muxer frame starts with version {VERSION}, got {version}")
    if type > FrameType.MOVE:
        raise ProtocolViolation(f"a muxer frame has type 0 to 4, got {type}")
    if flags & ~ALL_FLAGS:
        raise ProtocolViolation(f"a muxer frame has flags 1, 2, 4 and 8, got {flags}")
    if (stream_id == 0) != (type >= FrameType.PING):
        raise ProtocolViolation(f"a muxer frame of type {FrameType(type).name} came for stream {stream_id}")
    if type == FrameType.DATA and length > MAX_PAYLOAD_BYTES:
        raise ProtocolViolation(f"a muxer frame holds up to {MAX_PAYLOAD_BYTES} bytes, {length} announced")
