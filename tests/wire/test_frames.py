"""Frames: any split gives them back; what is announced costs nothing until it comes; what is not allowed is refused."""

import contextlib
import struct
import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.wire.frames import FrameDecoder, WireLimits, encode_frame, unpack_strictly

PEER = PeerId("12D3KooWpeer")

headers = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.text(max_size=8)
        | st.binary(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=5,
)
frames = st.tuples(headers, st.lists(st.binary(max_size=300), max_size=3))


def joined(header: dict, *buffers: bytes) -> bytes:
    return b"".join(encode_frame(header, buffers))


@given(st.lists(frames, max_size=4), st.data())
@settings(deadline=None)
def test_any_split_of_the_bytes_gives_the_frames_back(sent: list, data: st.DataObject) -> None:
    stream = b"".join(joined(header, *buffers) for header, buffers in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder = FrameDecoder()
    received = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        decoder.feed(stream[start:end])
        while (frame := decoder.next_frame()) is not None:
            received.append((frame.header, bytes(frame.body)))
    assert received == [(header, b"".join(buffers)) for header, buffers in sent]
    assert not decoder.in_frame


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_arbitrary_bytes_give_frames_or_a_protocol_violation(garbage: bytes) -> None:
    decoder = FrameDecoder(WireLimits(max_frame_bytes=300, max_header_bytes=100), PEER)
    decoder.feed(garbage)
    with contextlib.suppress(ProtocolViolation):
        while decoder.next_frame() is not None:
            pass
    assert decoder.held_bytes <= len(garbage)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_arbitrary_headers_give_frames_or_a_protocol_violation(packed: bytes) -> None:
    decoder = FrameDecoder(peer_id=PEER)
    decoder.feed(struct.pack("!II", 4 + len(packed), len(packed)) + packed)
    try:
        frame = decoder.next_frame()
    except ProtocolViolation:
        return
    assert frame is not None
    assert isinstance(frame.header, dict)


def test_bodies_are_writable_and_not_shared() -> None:
    decoder = FrameDecoder()
    decoder.feed(joined({"n": 1}, b"first") + joined({"n": 2}, b"second"))
    first, second = decoder.next_frame(), decoder.next_frame()
    assert first is not None
    assert second is not None
    first.body[:] = b"FIRST"
    assert bytes(second.body) == b"second"


def test_tensor_bytes_are_not_copied_on_the_way_out() -> None:
    buffer = bytearray(1 << 20)
    assert encode_frame({}, [buffer])[1] is buffer


def test_promised_bytes_cost_nothing_until_they_come() -> None:
    decoder = FrameDecoder()
    header = msgpack.packb({"type": "step"})
    tracemalloc.start()
    decoder.feed(struct.pack("!II", 64 << 20, len(header)) + header + bytes(1000))
    assert decoder.next_frame() is None
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000
    assert decoder.held_bytes == 1000


@pytest.mark.parametrize(
    ("lengths", "complaint"),
    [
        ((1001, 10), "a frame of 1001 bytes, at most 1000 are taken"),
        ((0xFFFFFFFF, 10), "a frame of 4294967295 bytes"),
        ((900, 101), "a header of 101 bytes, at most 100 are taken"),
        ((3, 1), "cannot hold its header"),
        ((50, 47), "cannot hold its header"),
        ((4, 0), "cannot hold its header"),
    ],
)
def test_bad_lengths_are_refused_before_anything_else_comes(lengths: tuple[int, int], complaint: str) -> None:
    decoder = FrameDecoder(WireLimits(max_frame_bytes=1000, max_header_bytes=100), PEER)
    decoder.feed(struct.pack("!II", *lengths))
    with pytest.raises(ProtocolViolation, match=complaint):
        decoder.next_frame()


@pytest.mark.parametrize(
    "packed",
    [
        b"\xc1",  # never used by msgpack
        b"\x91" * 600,  # too deep
        b"\x81\xa1",  # cut short
        b"\xc0\xc0",  # trailing bytes
        b"\xa1\xff",  # not UTF-8
        b"\xc7\x00\x05",  # an extension
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xdd\xff\xff\xff\xff",  # a list of 4 billion
        b"\x81\x01\x02",  # a number for a key
        b"\x92\x01\x02",  # not a map
        b"\x81\xc4\x01a\x02",  # bytes for a key
    ],
)
def test_headers_that_are_not_plain_msgpack_maps_are_refused(packed: bytes) -> None:
    decoder = FrameDecoder(peer_id=PEER)
    decoder.feed(struct.pack("!II", 4 + len(packed), len(packed)) + packed)
    with pytest.raises(ProtocolViolation, match=r"12D3KooWpeer sent a header that is not"):
        decoder.next_frame()


def test_lists_longer_than_the_limit_are_refused() -> None:
    assert unpack_strictly(msgpack.packb([0] * 5), max_items=5) == [0] * 5
    with pytest.raises(ValueError, match="max_array_len"):
        unpack_strictly(msgpack.packb([0] * 6), max_items=5)


def test_a_header_that_no_one_would_take_is_not_sent() -> None:
    with pytest.raises(ConfigError, match="at most 65536 bytes"):
        encode_frame({"text": "x" * 70_000})
