"""Frames: bytes off a stream in any pieces -> a checked header and a body, and back. No I/O, no messages, no torch.

    u32 frame length | u32 header length | header: one msgpack map | body: raw bytes (tensors, one after the other)

Lengths are big endian; the frame length counts everything after itself. Nothing a peer announces is believed: lengths
are held against `WireLimits` as soon as they are read, and memory grows with the bytes that have come, never with the
bytes promised, so that a liar who announces 64 MiB and sends none costs nothing. The body gets a buffer of its own,
writable and aligned as malloc aligns, so that a tensor can lie on it without a copy.

Read `wire/serialization.py` next: what the headers say.
"""

import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Never

import msgpack

from p2pswarm.core.errors import ConfigError, ProtocolViolation
from p2pswarm.core.ids import PeerId

Buffer = bytes | bytearray | memoryview

_PREFIX = struct.Struct("!II")
_HEADER_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class WireLimits:
    """The most that is taken from a peer in one frame."""

    max_frame_bytes: int = 64 << 20
    """2048 float32 tokens of a model with hidden size 8192; longer prompts come in several steps."""
    max_header_bytes: int = 64 << 10
    max_items: int = 4096
    """Entries of any one list or map in a header."""
    max_tensors: int = 8
    max_tensor_bytes: int = 64 << 20
    """Of one tensor, as it travels and once decoded."""
    max_dimensions: int = 4


DEFAULT_LIMITS = WireLimits()


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, split but not interpreted."""

    header: Mapping[str, Any]
    body: memoryview
    """Writable, and nobody else's."""


def encode_frame(header: Mapping[str, Any], buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """What to write: lengths and header in one piece, then `buffers` as they are, not copied.

    Raises `ConfigError` where no receiver with the default limits would take it.
    """
    packed: bytes = msgpack.packb(header)
    if len(packed) > DEFAULT_LIMITS.max_header_bytes:
        raise ConfigError(f"a frame header has at most {DEFAULT_LIMITS.max_header_bytes} bytes, this one {len(packed)}")
    frame_bytes = _HEADER_LENGTH_BYTES + len(packed) + sum(map(num_bytes, buffers))
    if frame_bytes > DEFAULT_LIMITS.max_frame_bytes:
        raise ConfigError(
            f"a frame has at most {DEFAULT_LIMITS.max_frame_bytes} bytes, this one {frame_bytes}: send less at once"
        )
    return [_PREFIX.pack(frame_bytes, len(packed)) + packed, *buffers]


def num_bytes(buffer: Buffer) -> int:
    """The size of the buffer, which for a memoryview need not be its `len`."""
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


class FrameDecoder:
    """Cuts frames out of the bytes of one stream. After a `ProtocolViolation` it is of no more use: the stream has
    lost its place."""

    def __init__(self, limits: WireLimits = DEFAULT_LIMITS, peer_id: PeerId | None = None) -> None:
        self._limits = limits
        self._peer_id = peer_id
        self._unread: deque[memoryview] = deque()
        self._gathered = bytearray()
        self._header_bytes: int | None = None
        self._body_bytes = 0
        self._header: Mapping[str, Any] | None = None

    @property
    def in_frame(self) -> bool:
        """Whether part of a frame has come: the stream may not end here."""
        return bool(self._gathered or self._unread or self._header_bytes is not None)

    @property
    def held_bytes(self) -> int:
        """Bytes of the unfinished frame in memory."""
        return len(self._gathered)

    def feed(self, data: Buffer) -> None:
        """Takes what came off the stream; keeps a reference, so the caller may not change it until `next_frame` gave
        None."""
        if len(data) > 0:
            self._unread.append(memoryview(data))

    def next_frame(self) -> Frame | None:
        """The next whole frame, None where more bytes are wanted first. Raises `ProtocolViolation`."""
        if self._header_bytes is None:
            prefix = self._gather(_PREFIX.size)
            if prefix is None:
                return None
            self._header_bytes, self._body_bytes = self._checked_lengths(*_PREFIX.unpack(prefix))
        if self._header is None:
            packed = self._gather(self._header_bytes)
            if packed is None:
                return None
            self._header = self._unpacked(packed)
        body = self._gather(self._body_bytes)
        if body is None:
            return None
        frame = Frame(self._header, memoryview(body))
        self._header_bytes = self._header = None
        return frame

    def _gather(self, wanted_bytes: int) -> bytearray | None:
        """A buffer of exactly so many bytes once they have come; until then they are collected (amortised linear)."""
        while (missing := wanted_bytes - len(self._gathered)) > 0:
            if not self._unread:
                return None
            piece = self._unread.popleft()
            if len(piece) > missing:
                self._unread.appendleft(piece[missing:])
            self._gathered += piece[:missing]
        gathered, self._gathered = self._gathered, bytearray()
        return gathered

    def _checked_lengths(self, frame_bytes: int, header_bytes: int) -> tuple[int, int]:
        limits = self._limits
        if frame_bytes > limits.max_frame_bytes:
            self._refuse(f"a frame of {frame_bytes} bytes, at most {limits.max_frame_bytes} are taken")
        if header_bytes > limits.max_header_bytes:
            self._refuse(f"a header of {header_bytes} bytes, at most {limits.max_header_bytes} are taken")
        body_bytes = frame_bytes - _HEADER_LENGTH_BYTES - header_bytes
        if body_bytes < 0 or header_bytes == 0:
            self._refuse(f"a frame of {frame_bytes} bytes that cannot hold its header of {header_bytes}")
        return header_bytes, body_bytes

    def _unpacked(self, packed: bytearray) -> Mapping[str, Any]:
        try:
            header = unpack_strictly(packed, self._limits.max_items)
        except ValueError as error:
            self._refuse(f"a header that is not msgpack as agreed ({type(error).__name__}: {error})")
        if not isinstance(header, dict) or not all(isinstance(key, str) for key in header):
            self._refuse("a header that is not a map with text for keys")
        return header

    def _refuse(self, got: str) -> Never:
        raise ProtocolViolation(f"{self._peer_id or 'the peer'} sent {got}", self._peer_id)


def unpack_strictly(packed: Buffer, max_items: int = DEFAULT_LIMITS.max_items) -> Any:
    """Plain msgpack data: no extension types, text or bytes for keys, lists and maps of bounded length.

    Raises `ValueError` for anything else, trailing bytes and invalid UTF-8 included. Depth is bounded by msgpack
    itself (512).
    """
    try:
        return msgpack.unpackb(
            packed, max_array_len=max_items, max_map_len=max_items, max_ext_len=0, ext_hook=_no_extension
        )
    except (
        msgpack.UnpackException
    ) as error:  # two of its classes (FormatError, StackError) are ValueErrors, the others not
        raise ValueError(str(error) or "cut short or too deep") from error


def _no_extension(code: int, data: bytes) -> Never:
    raise ValueError(f"extension type {code} is not allowed")
