"""Messages: each survives the trip; strangers' messages are checked field by field; what is new is passed over."""

import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError, MalformedMessage, ProtocolViolation, UnknownMessage, UnsupportedVersion
from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.core.span import Span
from p2pswarm.testing.message_strategies import messages
from p2pswarm.wire.frames import Frame, FrameDecoder, WireLimits
from p2pswarm.wire.messages import (
    Codec,
    ErrorCode,
    ErrorReply,
    Forward,
    ForwardReply,
    InfoRequest,
    Message,
    NextHop,
    OpenSession,
    PushedStep,
    SessionOpened,
    Step,
    StepReply,
    WireTensor,
    encoded_num_bytes,
)
from p2pswarm.wire.serialization import decode_message, encode_message

PEER = PeerId("12D3KooWpeer")
HIDDEN = WireTensor("float32", (1, 2, 3), bytes(range(24)))
MASK = WireTensor("bool", (1, 2), b"\x00\x01")
STEP = Step(7, 5, HIDDEN, attention_mask=MASK)


def frame_of(buffers: list[Any]) -> Frame:
    decoder = FrameDecoder(peer_id=PEER)
    decoder.feed(b"".join(buffers))
    frame = decoder.next_frame()
    assert frame is not None
    return frame


def changed(message: Message, body: bytes | None = None, **fields: Any) -> Frame:
    """The message's frame with header fields replaced."""
    frame = frame_of(encode_message(message))
    return Frame({**frame.header, **fields}, frame.body if body is None else memoryview(bytearray(body)))


@given(messages(), st.integers(1, 50))
@settings(deadline=None)
def test_every_message_survives_the_trip_in_pieces(message: Message, piece_bytes: int) -> None:
    stream = b"".join(encode_message(message))
    decoder = FrameDecoder()
    for start in range(0, len(stream), piece_bytes):
        assert decoder.next_frame() is None
        decoder.feed(stream[start : start + piece_bytes])
    frame = decoder.next_frame()
    assert frame is not None
    assert decode_message(frame) == message


def test_the_header_is_as_the_protocol_page_says() -> None:
    frame = frame_of(encode_message(STEP))
    assert frame.header == {
        "type": "step",
        "version": 4,
        "step_id": 7,
        "position": 5,
        "tensors": [
            ["hidden_states", "float32", [1, 2, 3], "none", 24],
            ["attention_mask", "bool", [1, 2], "none", 2],
        ],
    }
    assert bytes(frame.body) == bytes(range(24)) + b"\x00\x01"


def test_tensors_lie_on_the_received_bytes() -> None:
    frame = frame_of(encode_message(STEP))
    message = decode_message(frame)
    assert isinstance(message, Step)
    frame.body[0] = 99
    assert message.hidden_states.data[0] == 99


@pytest.mark.parametrize("name", ["forwards", "from_the_future", "", None, 7, ["step"]])
def test_unknown_types_are_told_apart_from_broken_messages(name: object) -> None:
    with pytest.raises(UnknownMessage, match="12D3KooWpeer sent a message of unknown type"):
        decode_message(Frame({"type": name}, memoryview(b"")), peer_id=PEER)


def test_unknown_fields_tensors_and_error_codes_are_passed_over() -> None:
    entries = [["colour", "complex64", [1], "zip", 3], ["hidden_states", "float32", [1, 2, 3], "none", 24]]
    frame = changed(StepReply(7, 5, HIDDEN), b"abc" + bytes(range(24)), mood="sunny", tensors=entries)
    assert decode_message(frame) == StepReply(7, 5, HIDDEN)
    assert decode_message(changed(ErrorReply(ErrorCode.BUSY, "no"), code="later")) == ErrorReply(
        ErrorCode.INTERNAL, "no"
    )


def test_newer_versions_are_welcome_and_too_old_ones_are_not() -> None:
    assert decode_message(changed(InfoRequest(), version=99)) == InfoRequest()
    with pytest.raises(UnsupportedVersion, match="speaks protocol versions up to 0, this node from 1 to 4"):
        decode_message(changed(InfoRequest(), version=0), peer_id=PEER)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"position": -1}, "position to be a whole number from 0"),
        ({"position": True}, "got True"),
        ({"position": 1.0}, "got 1.0"),
        ({"position": None}, "got nothing"),
        ({"position": 1 << 62}, "position is a whole number from 0 to 16777216"),
        ({"version": "1"}, "version to be a whole number"),
        ({"tensors": "all"}, "tensors to be a list of at most 8"),
        ({"tensors": [["hidden_states"]] * 9}, "tensors to be a list of at most 8"),
        ({"tensors": []}, "a body of the 0 bytes that its tensors take, got 26"),
    ],
)
def test_fields_of_the_wrong_kind_are_named(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(MalformedMessage, match=complaint) as caught:
        decode_message(changed(STEP, **fields), peer_id=PEER)
    assert caught.value.peer_id == PEER
    assert "12D3KooWpeer" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (["hidden_states", "float32", [1, 2, 3], "none", 23], "takes 24 bytes"),
        (["hidden_states", "float32", [1, 2, 4], "none", 26], "takes 32 bytes"),
        (["hidden_states", "float64", [1, 2, 3], "none", 26], "not float64"),
        (["hidden_states", "float32", [1, 2, 3], "zip", 26], "codec to be one of"),
        (["hidden_states", "float32", [26], "none", 26], "takes 104 bytes"),
        (["hidden_states", "bool", [1, 2, 13], "none", 26], "hidden_states are floats of shape"),
        (["hidden_states", "float32", [1, 2, -3], "none", 26], "lists \\[name, dtype"),
        (["hidden_states", "float32", [1, 2, 3.0], "none", 26], "lists \\[name, dtype"),
        (["hidden_states", "float32", [1, 1, 1, 2, 3], "none", 26], "of at most 4 dimensions"),
        (["hidden_states", "float32", [1 << 31, 1 << 31, 3], "none", 26], "67108864 bytes"),
        (["hidden_states", "float32", [1, 2, 1 << 30], "none", 26], "67108864 bytes"),
        (["hidden_states", "float32", [1, 2, 3], "none", 1 << 40], "67108864 bytes"),
        (["hidden_states", "float32", [0, 1, 3], "none", 0], "a body of the 0 bytes"),
        (["hidden_states", "int64", [1, 1, 3], "float16", 6], "is for float tensors"),
        (["other", "float32", [1, 2, 3], "none", 26], "a tensor hidden_states, got none"),
        ("hidden_states", "lists \\[name, dtype"),
    ],
)
def test_tensors_that_do_not_add_up_are_refused(entry: object, complaint: str) -> None:
    with pytest.raises(MalformedMessage, match=complaint):
        decode_message(changed(STEP, tensors=[entry]), peer_id=PEER)


def test_side_tensors_must_fit_the_hidden_states() -> None:
    wrong = WireTensor("bool", (1, 3), bytes(3))
    with pytest.raises(ConfigError, match=r"attention_mask is bool of shape \[1, 2\]"):
        Step(0, 0, HIDDEN, attention_mask=wrong)
    with pytest.raises(ConfigError, match="position_ids is int64"):
        Forward(ModelId("m"), Span(0, 1), HIDDEN, position_ids=MASK)
    with pytest.raises(ConfigError, match="beam_indices is int64"):
        Step(0, 0, HIDDEN, beam_indices=WireTensor("int64", (2,), bytes(16)))


def test_what_only_pushing_peers_know_is_left_out_where_it_is_not_used() -> None:
    assert "push_to" not in frame_of(encode_message(STEP)).header
    assert "from_push" not in frame_of(encode_message(StepReply(7, 7, HIDDEN))).header


def test_an_older_client_waits_for_no_room_and_announces_no_tokens() -> None:
    request = OpenSession(SessionId("s"), ModelId("m"), Span(0, 1), 10, 1, alloc_timeout_s=2.5, first_tokens=7)
    frame = frame_of(encode_message(request))
    assert decode_message(frame) == request
    older = {name: value for name, value in frame.header.items() if name not in ("alloc_timeout_s", "first_tokens")}
    assert decode_message(replace(frame, header=older)) == replace(request, alloc_timeout_s=0.0, first_tokens=0)


def test_a_next_hop_travels_as_the_protocol_page_says() -> None:
    step = PushedStep(7, 5, 2, push_to=NextHop(PEER, SessionId("s"), ("/ip4/10.0.0.1/tcp/4001",)))
    assert frame_of(encode_message(step)).header == {
        "type": "pushed_step",
        "version": 4,
        "step_id": 7,
        "position": 5,
        "num_tokens": 2,
        "push_to": {"peer_id": PEER, "session_id": "s", "addresses": ["/ip4/10.0.0.1/tcp/4001"]},
    }


@pytest.mark.parametrize(
    ("push_to", "complaint"),
    [
        ("somewhere", "push_to of step from 12D3KooWpeer: wanted a map"),
        ({"peer_id": "p"}, "session_id to be text"),
        ({"peer_id": "p q", "session_id": "s"}, "peer_id is short printable"),
        ({"peer_id": "p", "session_id": ""}, "session_id is short printable"),
        ({"peer_id": "p", "session_id": "s", "addresses": ["a"] * 9}, "at most 8 texts"),
        ({"peer_id": "p", "session_id": "s", "addresses": ["a" * 257]}, "of at most 256 characters"),
    ],
)
def test_next_hops_are_checked(push_to: object, complaint: str) -> None:
    with pytest.raises(MalformedMessage, match=complaint):
        decode_message(changed(STEP, push_to=push_to), peer_id=PEER)


def test_a_pushed_step_becomes_whole_with_hidden_states_that_fit() -> None:
    pushed = PushedStep(7, 5, 2, attention_mask=MASK)
    assert pushed.with_hidden_states(HIDDEN) == STEP
    with pytest.raises(ConfigError, match="attention_mask is bool"):
        pushed.with_hidden_states(WireTensor("float32", (2, 2, 3), bytes(48)))
    with pytest.raises(ConfigError, match="wanted hidden states of 3 tokens, got 2"):
        PushedStep(7, 5, 3).with_hidden_states(HIDDEN)
    with pytest.raises(ConfigError, match=r"attention_mask is bool of shape \[1, 3\]"):
        PushedStep(7, 5, 3, attention_mask=MASK)


def test_limits_on_tensors_are_the_callers() -> None:
    with pytest.raises(MalformedMessage, match="20 bytes"):
        decode_message(frame_of(encode_message(STEP)), WireLimits(max_tensor_bytes=20))


@given(
    st.dictionaries(
        st.sampled_from(
            ["type", "version", "step_id", "position", "tensors", "span", "info", "peers", "codec", "code"]
        ),
        st.recursive(
            st.none()
            | st.integers()
            | st.floats()
            | st.sampled_from(["step", "forward", "open_session", "info_reply", "hidden_states", "float32", "none"]),
            lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=12,
        ),
    ),
    st.binary(max_size=50),
)
@settings(deadline=None, max_examples=300)
def test_any_header_gives_a_message_or_a_malformed_message(header: dict[str, Any], body: bytes) -> None:
    frame = Frame(header, memoryview(bytearray(body)))
    with contextlib.suppress(MalformedMessage):
        assert b"".join(encode_message(decode_message(frame, peer_id=PEER)))


@given(messages(), st.data())
@settings(deadline=None, max_examples=300)
def test_a_flipped_byte_gives_a_message_or_a_protocol_violation(message: Message, data: st.DataObject) -> None:
    stream = bytearray(b"".join(encode_message(message)))
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    decoder = FrameDecoder(peer_id=PEER)
    decoder.feed(bytes(stream))
    with contextlib.suppress(ProtocolViolation):
        while (frame := decoder.next_frame()) is not None:
            assert b"".join(encode_message(decode_message(frame, peer_id=PEER)))


def test_messages_that_cannot_be_right_are_not_made() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        OpenSession(SessionId("s"), ModelId("m"), Span(0, 1), 10, 0)
    with pytest.raises(ConfigError, match="max_length"):
        OpenSession(SessionId("s"), ModelId("m"), Span(0, 1), 0, 1)
    with pytest.raises(ConfigError, match="first_tokens is a whole number from 0 to 10, got 11"):
        OpenSession(SessionId("s"), ModelId("m"), Span(0, 1), 10, 1, first_tokens=11)
    for alloc_timeout_s in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="alloc_timeout_s is a number of seconds from 0 to 3600"):
            OpenSession(SessionId("s"), ModelId("m"), Span(0, 1), 10, 1, alloc_timeout_s=alloc_timeout_s)
    with pytest.raises(ConfigError, match="session_id"):
        SessionOpened(SessionId("two words"))
    with pytest.raises(ConfigError, match="hidden_states"):
        ForwardReply(WireTensor("float32", (2, 3), bytes(24)))
    with pytest.raises(ConfigError, match="at most 8 addresses"):
        NextHop(PEER, SessionId("s"), ("/ip4/10.0.0.1/tcp/1",) * 9)
    with pytest.raises(ConfigError, match="at most 1024"):
        ErrorReply(ErrorCode.BUSY, "x" * 1025)
    assert ErrorReply.shortened(ErrorCode.BUSY, "x" * 1025).message == "x" * 1024


def test_sizes_on_the_wire_are_written_out() -> None:
    assert encoded_num_bytes("float32", (2, 3, 70), Codec.NONE) == 1680
    assert encoded_num_bytes("float32", (2, 3, 70), Codec.FLOAT16) == 840
    assert encoded_num_bytes("bfloat16", (2, 3, 70), Codec.BLOCKWISE_INT8) == 420 + 12 * 4
    assert encoded_num_bytes("int64", (), Codec.NONE) == 8
