"""Hypothesis strategies for what travels: every message, `ServerInfo`, tensors. Needs hypothesis, which users lack."""

from typing import get_type_hints

from hypothesis import strategies as st

from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.core.reachability import Reachability
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.server_load import ServerLoad
from p2pswarm.core.span import Span
from p2pswarm.wire.messages import (
    FLOAT_DTYPES,
    MAX_ALLOC_TIMEOUT_S,
    MAX_LENGTH,
    MAX_SPEED_TEST_BYTES,
    MAX_STEP_ID,
    Backward,
    BackwardReply,
    Codec,
    ErrorCode,
    ErrorReply,
    Forward,
    ForwardReply,
    InfoReply,
    InfoRequest,
    Message,
    NextHop,
    OpenSession,
    Push,
    PushedStep,
    PushReply,
    SessionOpened,
    SpeedTest,
    SpeedTestReply,
    Step,
    StepReply,
    WireTensor,
    encoded_num_bytes,
)
from p2pswarm.wire.tuning import TunedLayer, WireTuning

_IDENTIFIERS = st.text("abcXYZ019-_.@/", min_size=1, max_size=20)
_NUMBERS = st.floats(0, 1e12)
_TEXTS = st.text("abc é漢🙂", max_size=20)
_STEP_IDS = st.integers(0, MAX_STEP_ID)
_POSITIONS = st.integers(0, MAX_LENGTH)
_SIZES = st.integers(1, 3)
_PATHS = st.sampled_from(["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "attn.c_attn", "mlp.experts.7.w1"])


def spans(max_block: int = 100) -> st.SearchStrategy[Span]:
    """Block ranges within `max_block` blocks."""
    starts = st.integers(0, max_block - 1)
    return starts.flatmap(lambda start: st.builds(Span, st.just(start), st.integers(start + 1, max_block)))


def server_infos() -> st.SearchStrategy[ServerInfo]:
    """Announcements that every reader takes."""
    return st.builds(
        ServerInfo,
        peer_id=_IDENTIFIERS.map(PeerId),
        model_id=_IDENTIFIERS.map(ModelId),
        span=spans(100),
        state=st.sampled_from(ServerState),
        addresses=st.lists(_IDENTIFIERS, max_size=4).map(tuple),
        num_model_blocks=st.integers(100, 200),
        throughput_tokens_per_s=_NUMBERS,
        inference_tokens_per_s=_NUMBERS,
        forward_tokens_per_s=_NUMBERS,
        network_tokens_per_s=_NUMBERS,
        dtype=st.sampled_from(sorted(FLOAT_DTYPES)),
        quantization=_IDENTIFIERS,
        cache_tokens_left=st.integers(0, 1 << 40),
        max_length=st.integers(0, 1 << 20),
        adapters=st.lists(_IDENTIFIERS, max_size=3).map(tuple),
        using_relay=st.booleans(),
        next_rtts_s=st.dictionaries(_IDENTIFIERS.map(PeerId), _NUMBERS, max_size=3),
        queue_delay_s=_NUMBERS,
        public_name=_TEXTS,
        version=_IDENTIFIERS,
        next_span=st.none() | spans(100),
        is_pinned=st.booleans(),
        reachability=st.sampled_from(Reachability),
    )


def server_loads() -> st.SearchStrategy[ServerLoad]:
    """Loads with any figures."""
    counts = st.integers(0, 1 << 40)
    return st.builds(
        ServerLoad,
        **{name: _NUMBERS if kind is float else counts for name, kind in get_type_hints(ServerLoad).items()},
    )


@st.composite
def wire_tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: str | None = None) -> WireTensor:
    """Tensors of that shape holding any bytes; float ones by any codec where no dtype is asked for."""
    codec = draw(st.sampled_from(Codec)) if dtype is None else Codec.NONE
    dtype = dtype or draw(st.sampled_from(sorted(FLOAT_DTYPES)))
    size_bytes = encoded_num_bytes(dtype, shape, codec)
    return WireTensor(dtype, shape, draw(st.binary(min_size=size_bytes, max_size=size_bytes)), codec)


def next_hops() -> st.SearchStrategy[NextHop]:
    """Where a server may be asked to push to."""
    addresses = st.lists(_IDENTIFIERS, max_size=3).map(tuple)
    return st.builds(NextHop, _IDENTIFIERS.map(PeerId), _IDENTIFIERS.map(SessionId), addresses)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Steps with and without masks, positions, beams and a next hop."""
    shape = _draw_shape(draw)
    return Step(
        draw(_STEP_IDS),
        draw(_POSITIONS),
        hidden_states=draw(wire_tensors(shape)),
        attention_mask=draw(st.none() | wire_tensors(shape[:2], "bool")),
        position_ids=draw(st.none() | wire_tensors(shape[:2], "int64")),
        beam_indices=draw(st.none() | wire_tensors(shape[:1], "int64")),
        push_to=draw(st.none() | next_hops()),
    )


def pushed_steps() -> st.SearchStrategy[PushedStep]:
    """The same without their hidden states."""
    return steps().map(
        lambda step: PushedStep(
            step.step_id,
            step.position,
            step.num_tokens,
            step.attention_mask,
            step.position_ids,
            step.beam_indices,
            step.push_to,
        )
    )


@st.composite
def tunings(draw: st.DrawFn, span: Span, hidden_size: int) -> WireTuning:
    """Deep prompts, low-rank pairs, or both, for the blocks of a span."""
    dtype = draw(st.sampled_from(sorted(FLOAT_DTYPES)))
    keys = draw(st.sets(st.tuples(st.integers(span.start, span.end - 1), _PATHS), max_size=3))
    with_prompts = not keys or draw(st.booleans())
    prompts = wire_tensors((span.num_blocks, draw(_SIZES), hidden_size), dtype)
    layers = []
    for block, path in sorted(keys):
        rank, num_inputs, num_outputs = draw(st.tuples(_SIZES, _SIZES, _SIZES))
        down, up = draw(wire_tensors((rank, num_inputs), dtype)), draw(wire_tensors((num_outputs, rank), dtype))
        layers.append(TunedLayer(block, path, down, up))
    return WireTuning(draw(prompts) if with_prompts else None, tuple(layers))


@st.composite
def forwards(draw: st.DrawFn) -> Forward:
    """Forward requests with and without masks, positions and tunings."""
    shape = _draw_shape(draw)
    span = draw(spans(10))
    return Forward(
        ModelId(draw(_IDENTIFIERS)),
        span,
        hidden_states=draw(wire_tensors(shape)),
        attention_mask=draw(st.none() | wire_tensors(shape[:2], "bool")),
        position_ids=draw(st.none() | wire_tensors(shape[:2], "int64")),
        codec=draw(st.sampled_from(Codec)),
        adapter=draw(st.none() | _IDENTIFIERS),
        tuning=draw(st.none() | tunings(span, shape[2])),
    )


@st.composite
def backwards(draw: st.DrawFn) -> Backward:
    """Backward requests: forward ones with the gradients of their answers."""
    forward = draw(forwards())
    gradients = wire_tensors(forward.hidden_states.shape).filter(lambda grad: grad.dtype == forward.hidden_states.dtype)
    return Backward(
        forward.model_id,
        forward.span,
        forward.hidden_states,
        draw(gradients),
        forward.attention_mask,
        forward.position_ids,
        forward.codec,
        forward.adapter,
        forward.tuning,
    )


def speed_test_data() -> st.SearchStrategy[WireTensor]:
    """A few bytes."""
    return st.integers(0, 100).flatmap(lambda size: wire_tensors((size,), "bool"))


def open_sessions(span: Span) -> st.SearchStrategy[OpenSession]:
    """Requests for sessions over the span, with and without tunings."""
    return st.builds(
        OpenSession,
        _IDENTIFIERS.map(SessionId),
        _IDENTIFIERS.map(ModelId),
        st.just(span),
        st.integers(100, MAX_LENGTH),
        st.integers(1, 1000),
        st.sampled_from(Codec),
        st.none() | _IDENTIFIERS,
        st.floats(0, MAX_ALLOC_TIMEOUT_S),
        st.integers(0, 100),
        st.none() | tunings(span, 2),
    )


def messages() -> st.SearchStrategy[Message]:
    """Every type of message."""
    shapes = st.tuples(st.integers(1, 2), st.integers(0, 3), st.integers(1, 4))
    answers = shapes.flatmap(wire_tensors)
    return st.one_of(
        st.builds(ErrorReply, st.sampled_from(ErrorCode), _TEXTS, st.none() | _STEP_IDS),
        st.just(InfoRequest()),
        st.builds(
            InfoReply,
            server_infos(),
            st.integers(0, 1000),
            st.dictionaries(_IDENTIFIERS.map(PeerId), st.lists(_IDENTIFIERS, max_size=3).map(tuple), max_size=3),
            st.none() | server_loads(),
        ),
        spans(10).flatmap(open_sessions),
        st.builds(SessionOpened, _IDENTIFIERS.map(SessionId)),
        steps(),
        pushed_steps(),
        st.builds(StepReply, _STEP_IDS, _POSITIONS, answers, st.booleans()),
        st.builds(Push, _IDENTIFIERS.map(SessionId), _STEP_IDS, answers),
        st.just(PushReply()),
        forwards(),
        st.builds(ForwardReply, answers),
        backwards(),
        st.builds(BackwardReply, answers, st.none() | spans(10).flatmap(lambda span: tunings(span, 2))),
        st.builds(SpeedTest, speed_test_data(), st.integers(0, MAX_SPEED_TEST_BYTES)),
        st.builds(SpeedTestReply, speed_test_data()),
    )


def _draw_shape(draw: st.DrawFn) -> tuple[int, int, int]:
    return draw(st.integers(1, 2)), draw(st.integers(0, 3)), draw(st.integers(1, 4))
