from collections import deque
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.errors import ProtocolViolation
from p2pswarm.net.mux_frames import (
    ACK,
    FIN,
    HEADER,
    MAX_PAYLOAD_BYTES,
    RST,
    SYN,
    Frame,
    FrameParser,
    FrameType,
    encode_header,
)

stream_ids = st.integers(1, 2**32 - 1)
flags = st.sampled_from([0, SYN, ACK, FIN, RST, SYN | FIN, ACK | RST])
data_frames = st.builds(
    lambda flags, stream_id, payload: Frame(FrameType.DATA, flags, stream_id, len(payload), payload),
    flags,
    stream_ids,
    st.binary(max_size=300),
)
window_updates = st.builds(
    lambda flags, stream_id, length: Frame(FrameType.WINDOW_UPDATE, flags, stream_id, length),
    flags,
    stream_ids,
    st.integers(0, 2**32 - 1),
)
pings = st.builds(
    lambda flags, number: Frame(FrameType.PING, flags, 0, number),
    st.sampled_from([SYN, ACK]),
    st.integers(0, 2**32 - 1),
)
frames = st.one_of(data_frames, window_updates, pings)


def encode(frame: Frame) -> bytes:
    return encode_header(FrameType(frame.type), frame.flags, frame.stream_id, frame.length) + frame.payload


def test_header_is_laid_out_as_the_yamux_specification_says() -> None:
    assert encode_header(FrameType.DATA, SYN, 3, 5) == bytes.fromhex("0000000100000003 00000005".replace(" ", ""))
    assert encode_header(FrameType.GO_AWAY, 0, 0, 1) == bytes.fromhex("000300000000000000000001")


@given(st.lists(frames, max_size=8))
def test_frames_survive_when_fed_whole(wanted: list[Frame]) -> None:
    parser = FrameParser()
    assert list(parser.feed(b"".join(map(encode, wanted)))) == wanted


@given(st.lists(frames, max_size=6), st.data())
def test_frames_survive_any_split_of_the_bytes(wanted: list[Frame], data: st.DataObject) -> None:
    encoded = b"".join(map(encode, wanted))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=10)))
    parser = FrameParser()
    pieces: list[Frame] = []
    for start, end in zip([0, *cuts], [*cuts, len(encoded)], strict=True):
        pieces += parser.feed(encoded[start:end])
    payloads = b"".join(piece.payload for piece in pieces)
    assert payloads == b"".join(frame.payload for frame in wanted)
    others = [piece for piece in pieces if piece.type != FrameType.DATA]
    assert others == [frame for frame in wanted if frame.type != FrameType.DATA]
    for flag in (SYN, ACK, FIN, RST):
        assert sum(bool(piece.flags & flag) for piece in pieces) == sum(bool(frame.flags & flag) for frame in wanted)


def test_closing_flags_come_with_the_last_piece_of_a_payload() -> None:
    parser = FrameParser()
    header = encode_header(FrameType.DATA, SYN | FIN, 7, 4)
    assert list(parser.feed(header + b"ab")) == [Frame(FrameType.DATA, SYN, 7, 2, b"ab")]
    assert list(parser.feed(b"c")) == [Frame(FrameType.DATA, 0, 7, 1, b"c")]
    assert list(parser.feed(b"d")) == [Frame(FrameType.DATA, FIN, 7, 1, b"d")]


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(1, 0, 0, 1, 0),
        HEADER.pack(0, 5, 0, 1, 0),
        HEADER.pack(0, 0, 16, 1, 0),
        HEADER.pack(0, 0, 0, 0, 1),
        HEADER.pack(0, 2, 1, 1, 0),
        HEADER.pack(0, 0, 0, 1, MAX_PAYLOAD_BYTES + 1),
    ],
    ids=["version", "type", "flags", "data for stream 0", "ping on a stream", "length"],
)
def test_impossible_headers_are_violations(header: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        list(FrameParser().feed(header))


def test_nothing_may_follow_a_move() -> None:
    move = encode_header(FrameType.MOVE, 0, 0, 0)
    for pieces in ([move + b"x"], [move, b"x"], [move[:5], move[5:] + move]):
        parser = FrameParser()
        with pytest.raises(ProtocolViolation, match="after the move"):
            deque(chain.from_iterable(map(parser.feed, pieces)))
        assert parser.is_over


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_arbitrary_bytes_give_frames_or_a_violation_and_nothing_is_kept(chunks: list[bytes]) -> None:
    parser = FrameParser()
    try:
        for chunk in chunks:
            for frame in parser.feed(chunk):
                assert len(frame.payload) <= sum(map(len, chunks))
            assert len(parser._partial_header) < HEADER.size
    except ProtocolViolation:
        pass
