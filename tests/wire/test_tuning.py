"""Tunings: what cannot be right is not made, what strangers send is checked, and nothing is copied on the way."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError, MalformedMessage
from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.core.span import Span
from p2pswarm.testing.message_strategies import tunings
from p2pswarm.wire.frames import Frame, FrameDecoder
from p2pswarm.wire.messages import (
    MAX_BODY_BYTES,
    Backward,
    BackwardReply,
    Codec,
    Forward,
    Message,
    OpenSession,
    WireTensor,
    encoded_num_bytes,
)
from p2pswarm.wire.serialization import decode_message, encode_message
from p2pswarm.wire.tuning import MAX_TUNED_LAYERS, TunedLayer, WireTuning, same_parts

PEER = PeerId("12D3KooWpeer")
SPAN = Span(4, 6)


def zeros(*shape: int, dtype: str = "float32", codec: Codec = Codec.NONE) -> WireTensor:
    return WireTensor(dtype, shape, bytes(encoded_num_bytes(dtype, shape, codec)), codec)


def layer(block: int = 4, path: str = "mlp.up_proj", rank: int = 1, **changes: Any) -> TunedLayer:
    return TunedLayer(block, path, changes.get("down", zeros(rank, 3)), changes.get("up", zeros(5, rank)))


TUNING = WireTuning(zeros(2, 7, 3), (layer(4, rank=2), layer(5)))
HIDDEN = zeros(2, 3, 3)
FORWARD = Forward(ModelId("m"), SPAN, HIDDEN, tuning=TUNING)


def frame_of(message: Message) -> Frame:
    decoder = FrameDecoder(peer_id=PEER)
    decoder.feed(b"".join(encode_message(message)))
    frame = decoder.next_frame()
    assert frame is not None
    return frame


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"block": -1}, "counted from 0, got -1"),
        ({"path": ""}, "path is at most 128 characters such as self_attn.q_proj, got ''"),
        ({"path": "a" * 129}, "at most 128 characters"),
        ({"path": "mlp..up"}, "got 'mlp..up'"),
        ({"path": "mlp.up\n"}, "such as self_attn"),
        ({"path": "mlp/up"}, "such as self_attn"),
        ({"path": "mlp.äh"}, "such as self_attn"),
        (
            {"down": zeros(3)},
            r"down of block 4 mlp.up_proj is \[rank, inputs\] with sizes from 1 to 16777216, got \[3\]",
        ),
        ({"down": zeros(0, 3), "up": zeros(5, 0)}, r"got \[0, 3\]"),
        ({"down": zeros(1, 0)}, r"got \[1, 0\]"),
        ({"up": zeros(0, 1)}, r"up of block 4 mlp.up_proj is \[outputs, rank\]"),
        ({"up": zeros(5, 2)}, r"share one rank, got 1 in \[1, 3\] and 2 in \[5, 2\]"),
        ({"up": zeros(5, 1, dtype="int64")}, "float by codec none, got int64"),
        ({"up": zeros(5, 1, codec=Codec.BLOCKWISE_INT8)}, "float32 by codec blockwise_int8"),
    ],
)
def test_layers_that_cannot_be_right_are_not_made(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        layer(**changes)


@pytest.mark.parametrize(
    ("prompts", "layers", "complaint"),
    [
        (None, (), "holds prompts or layers"),
        (zeros(2, 3), (), r"prompts is \[blocks, prompt tokens, hidden\]"),
        (zeros(2, 0, 3), (), r"got \[2, 0, 3\]"),
        (zeros(2, 1, 3, codec=Codec.FLOAT16), (), "by codec float16"),
        (None, (layer(5), layer(4)), "sorted by block and path"),
        (None, (layer(4, "b"), layer(4, "a")), "sorted by block and path"),
        (None, (layer(4), layer(4)), "each at most once"),
        (zeros(2, 1, 3, dtype="bfloat16"), (layer(),), "have one dtype, got bfloat16 and float32"),
        (None, tuple(layer(index) for index in range(MAX_TUNED_LAYERS + 1)), "at most 1024 layers a message, got 1025"),
    ],
)
def test_tunings_that_cannot_be_right_are_not_made(
    prompts: WireTensor | None, layers: tuple[TunedLayer, ...], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        WireTuning(prompts, layers)


@pytest.mark.parametrize(
    ("tuning", "complaint"),
    [
        (WireTuning(layers=(layer(3),)), "a tuning for blocks 4:6 has no layers of others, got block 3 mlp.up_proj"),
        (WireTuning(layers=(layer(6),)), "got block 6"),
        (WireTuning(zeros(3, 1, 3)), "blocks 4:6 take prompts for 2 blocks, got 3"),
        (WireTuning(zeros(2, 1, 4)), "prompts have the hidden size of the inputs, 3, got 4"),
    ],
)
def test_a_tuning_is_for_the_blocks_of_its_message(tuning: WireTuning, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        replace(FORWARD, tuning=tuning)
    with pytest.raises(ConfigError, match=complaint):
        Backward(ModelId("m"), SPAN, HIDDEN, HIDDEN, tuning=tuning)
    if "hidden size" not in complaint:  # which a session's request does not say
        with pytest.raises(ConfigError, match=complaint):
            OpenSession(SessionId("s"), ModelId("m"), SPAN, 10, 1, tuning=tuning)


def test_gradients_are_for_what_came_out() -> None:
    with pytest.raises(
        ConfigError, match=r"grad_outputs are float32 of shape \[2, 3, 3\], as hidden_states, got float32"
    ):
        Backward(ModelId("m"), SPAN, HIDDEN, zeros(2, 4, 3))
    with pytest.raises(ConfigError, match="got bfloat16"):
        Backward(ModelId("m"), SPAN, HIDDEN, zeros(2, 3, 3, dtype="bfloat16"))
    assert Backward(ModelId("m"), SPAN, HIDDEN, zeros(2, 3, 3, codec=Codec.BLOCKWISE_INT8))


def test_what_no_answer_could_carry_is_not_asked_for() -> None:
    half = zeros(1, MAX_BODY_BYTES // 8, 1)
    prompts = WireTuning(zeros(2, MAX_BODY_BYTES // 12, 1))
    assert Forward(ModelId("m"), SPAN, half, tuning=prompts)  # whose answer has no gradients for the prompts
    with pytest.raises(ConfigError, match=r"to this it would have 78.* send fewer rows at once"):
        Backward(ModelId("m"), SPAN, half, half, tuning=prompts)
    with pytest.raises(ConfigError, match="at most 67043328 bytes of tensors"):
        Forward(ModelId("m"), SPAN, zeros(1, 1 << 24, 1, codec=Codec.BLOCKWISE_INT8))


def test_a_tuning_travels_as_the_protocol_page_says() -> None:
    frame = frame_of(FORWARD)
    assert frame.header["tuning"] == {
        "prompts": [2, 7, 3],
        "layers": [[4, "mlp.up_proj", 2, 3, 5], [5, "mlp.up_proj", 1, 3, 5]],
    }
    assert frame.header["tensors"][0] == ["tuning", "float32", [42 + 16 + 8], "none", 264]


def test_the_parts_are_not_copied_and_come_in_their_order() -> None:
    parts = [bytearray([index]) * 12 for index in range(1, 6)]
    numbered = [WireTensor("float32", (1, 3) if index % 2 else (3, 1), part) for index, part in enumerate(parts)]
    prompts = replace(numbered[0], shape=(1, 1, 3))
    sent = WireTuning(prompts, (TunedLayer(4, "a", *numbered[1:3]), TunedLayer(4, "b", *numbered[3:5])))
    message = BackwardReply(zeros(1, 1, 3), sent)
    buffers = encode_message(message)
    assert all(any(buffer is part for buffer in buffers) for part in parts)
    frame = frame_of(message)
    came = decode_message(frame)
    assert isinstance(came, BackwardReply)
    assert came.grad_tuning is not None
    frame.body[0:60] = bytes(60)
    assert [bytes(tensor.data) for tensor in came.grad_tuning.tensors()] == [bytes(12)] * 5


def test_the_most_layers_fit_into_a_header() -> None:
    deepest = [layer(block, "model.some_attention.q_proj", down=zeros(1, 1), up=zeros(1, 1)) for block in range(1024)]
    request = Forward(ModelId("m"), Span(0, 1024), HIDDEN, tuning=WireTuning(None, tuple(deepest)))
    assert decode_message(frame_of(request)) == request


def test_gradients_have_the_parts_of_what_they_are_for() -> None:
    assert same_parts(TUNING, WireTuning(zeros(2, 7, 3), TUNING.layers))
    assert same_parts(None, None)
    assert not same_parts(TUNING, None)
    assert not same_parts(TUNING, replace(TUNING, prompts=None))
    assert not same_parts(TUNING, replace(TUNING, prompts=zeros(2, 8, 3)))
    assert not same_parts(TUNING, replace(TUNING, layers=TUNING.layers[:1]))
    assert not same_parts(TUNING, replace(TUNING, layers=(TUNING.layers[0], layer(5, up=zeros(4, 1)))))
    one_layer = WireTuning(None, (layer(),))
    assert not same_parts(
        one_layer, WireTuning(None, (layer(down=zeros(1, 3, dtype="float16"), up=zeros(5, 1, dtype="float16")),))
    )


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ({"tuning": None}, "tuning of forward from 12D3KooWpeer: wanted a map, not None"),
        ({"tuning": [1]}, "wanted a map"),
        ({"tuning": {}}, "0 bytes for these sizes, got 264"),
        ({"tuning": {"prompts": [2, 7]}}, "prompts to be sizes"),
        ({"tuning": {"prompts": [2, 7, 3, 1]}}, "at most 3 entries"),
        ({"tuning": {"prompts": [2, 7, 3.0]}}, "prompts to be sizes"),
        ({"tuning": {"prompts": [2, 10, 3]}}, "240 bytes for these sizes, got 264"),
        ({"tuning": {"prompts": [2, 12, 3]}}, "takes 288 bytes with codec none, got 264"),
        ({"tuning": {"prompts": [2, -7, 3]}}, "no negative sizes"),
        ({"tuning": {"layers": [[4, "a", 1, 3]]}}, "lists \\[block, path, rank, inputs, outputs\\]"),
        ({"tuning": {"layers": [[True, "a", 1, 3, 5]]}}, "lists \\[block, path"),
        ({"tuning": {"layers": [["4", "a", 1, 3, 5]]}}, "lists \\[block, path"),
        ({"tuning": {"layers": [[4, "a", 1 << 40, 1 << 40, 1]]}}, "takes 4835703278458516698824704 bytes"),
        ({"tuning": {"layers": [[4, "a", 0, 66, 0]]}}, "with sizes from 1"),
        ({"tuning": {"layers": [[4, "a", 1, 1, 1]] * 1025}}, "a list of at most 1024 entries"),
        ({"tuning": {"layers": [[9, "a", 1, 33, 33]]}}, "no layers of others, got block 9 a"),
        (
            {"tensors": [["hidden_states", "float32", [2, 3, 3], "none", 72], ["x", "bool", [264], "none", 264]]},
            "a tensor",
        ),
    ],
)
def test_what_a_stranger_says_of_its_tuning_is_checked(header: dict[str, Any], complaint: str) -> None:
    frame = frame_of(FORWARD)
    with pytest.raises(MalformedMessage, match=complaint):
        decode_message(Frame({**frame.header, **header}, frame.body), peer_id=PEER)


def test_a_tuning_by_a_codec_is_refused() -> None:
    frame = frame_of(replace(FORWARD, tuning=WireTuning(zeros(2, 1, 3))))
    packed, hidden_states = frame.header["tensors"]
    header = {**frame.header, "tensors": [[*packed[:3], "float16", 12], hidden_states]}
    with pytest.raises(MalformedMessage, match="tensor tuning to be of one dimension by codec none, got float16"):
        decode_message(Frame(header, frame.body[12:]), peer_id=PEER)


@given(
    st.recursive(
        st.none() | st.integers(-2, 70) | st.sampled_from(["a", "mlp.up_proj"]),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["prompts", "layers"]), inner),
        max_leaves=20,
    )
)
@settings(deadline=None, max_examples=300)
def test_any_field_gives_a_tuning_or_a_malformed_message(field: object) -> None:
    frame = frame_of(FORWARD)
    with contextlib.suppress(MalformedMessage):
        assert decode_message(Frame({**frame.header, "tuning": field}, frame.body), peer_id=PEER)


@given(tunings(Span(0, 3), 2), st.data())
@settings(deadline=None)
def test_a_tuning_cut_anywhere_is_refused(tuning: WireTuning, data: st.DataObject) -> None:
    frame = frame_of(OpenSession(SessionId("s"), ModelId("m"), Span(0, 3), 10, 1, tuning=tuning))
    (entry,) = frame.header["tensors"]
    num_elements = data.draw(st.integers(0, tuning.num_elements - 1))
    num_bytes = tuning.num_bytes // tuning.num_elements * num_elements
    header = {**frame.header, "tensors": [[*entry[:2], [num_elements], "none", num_bytes]]}
    with pytest.raises(MalformedMessage):
        decode_message(Frame(header, frame.body[:num_bytes]), peer_id=PEER)
