"""Messages <-> frames: one writer and one reader for each type, in one table.

A header is a map: `type`, `version` (the newest protocol version its sender speaks), the message's own fields, and
`tensors`, a list of `[field, dtype, shape, codec, bytes]` in the order in which their bytes follow in the body.
Fields, tensors and error codes that a reader does not know it passes over; a `type` it does not know raises
`UnknownMessage`, which is answered, not punished. A tuning is one entry of `tensors` and one field that says how its
bytes are cut (`wire/tuning_fields.py`).

Read `docs/protocol.md` for the same from the outside.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from p2pswarm.core.errors import ConfigError, MalformedMessage, UnknownMessage, UnsupportedVersion
from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.wire.fields import Fields
from p2pswarm.wire.frames import DEFAULT_LIMITS, Buffer, Frame, WireLimits, encode_frame, num_bytes
from p2pswarm.wire.messages import (
    MAX_NEXT_HOP_ADDRESS_CHARACTERS,
    MAX_NEXT_HOP_ADDRESSES,
    MIN_PROTOCOL_VERSION,
    PROTOCOL_VERSION,
    Backward,
    BackwardReply,
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
)
from p2pswarm.wire.server_info import MAX_ADDRESS_CHARACTERS, MAX_ADDRESSES, read_server_info, server_info_values
from p2pswarm.wire.server_load import read_server_load, server_load_values
from p2pswarm.wire.tensors import ITEM_BYTES, Codec, WireTensor
from p2pswarm.wire.tuning import WireTuning
from p2pswarm.wire.tuning_fields import read_tuning, tuning_values

MAX_PEERS_TOLD = 64
MAX_SIZE = (1 << 31) - 1
"""Of one dimension of a tensor."""

_ENTRY_TYPES = [str, str, list, str, int]
_CODECS = {codec.value: codec for codec in Codec}
_ERROR_CODES = {code.value: code for code in ErrorCode}


def encode_message(message: Message) -> list[Buffer]:
    """What to write on the stream; tensor bytes are passed on, not copied."""
    kind = _KINDS_BY_CLASS[type(message)]
    header: dict[str, Any] = {"type": kind.name, "version": PROTOCOL_VERSION, **kind.values(message)}
    buffers: list[Buffer] = []
    tensors = []
    for name in kind.tensor_names:
        tensor: WireTensor | WireTuning | None = getattr(message, name)
        if isinstance(tensor, WireTensor):
            tensors.append((name, tensor.dtype, tensor.shape, tensor.codec.value, num_bytes(tensor.data)))
            buffers.append(tensor.data)
        elif tensor is not None:
            tensors.append((name, tensor.dtype, (tensor.num_elements,), Codec.NONE.value, tensor.num_bytes))
            buffers.extend(part.data for part in tensor.tensors())
    if tensors:
        header["tensors"] = tensors
    return encode_frame(header, buffers)


def decode_message(frame: Frame, limits: WireLimits = DEFAULT_LIMITS, peer_id: PeerId | None = None) -> Message:
    """The message in the frame; its tensors lie on the frame's body. Raises `MalformedMessage` or one of its
    children."""
    name = frame.header.get("type")
    kind = _KINDS_BY_NAME.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UnknownMessage(f"{peer_id or 'the peer'} sent a message of unknown type {reprlib.repr(name)}", peer_id)
    fields = Fields(frame.header, kind.name, peer_id)
    _check_version(sender_version(frame, peer_id), peer_id)
    try:
        return kind.read(fields, _read_tensors(fields, frame.body, kind, limits))
    except ConfigError as error:
        raise MalformedMessage(f"{kind.name} from {peer_id or 'the peer'}: {error}", peer_id) from error


def message_types() -> tuple[str, ...]:
    """The types of message that this node understands."""
    return tuple(_KINDS_BY_NAME)


def sender_version(frame: Frame, peer_id: PeerId | None = None) -> int:
    """The newest protocol version that the sender of the frame speaks."""
    return Fields(frame.header, "header", peer_id).integer("version", default=1)


def _check_version(version: int, peer_id: PeerId | None) -> None:
    if version < MIN_PROTOCOL_VERSION:
        raise UnsupportedVersion(
            f"{peer_id or 'the peer'} speaks protocol versions up to {version}, "
            f"this node from {MIN_PROTOCOL_VERSION} to {PROTOCOL_VERSION}",
            peer_id,
        )


class _Tensors:
    """The tensors of one frame, by field."""

    def __init__(self, tensors: Mapping[str, WireTensor], fields: Fields) -> None:
        self._tensors = tensors
        self._fields = fields

    def required(self, name: str) -> WireTensor:
        if name not in self._tensors:
            self._fields.refuse(f"a tensor {name}, got {', '.join(self._tensors) or 'none'}")
        return self._tensors[name]

    def optional(self, name: str) -> WireTensor | None:
        return self._tensors.get(name)


def _read_tensors(fields: Fields, body: memoryview, kind: "_Kind", limits: WireLimits) -> _Tensors:
    tensors = {}
    offset = 0
    for entry in fields.items("tensors", limits.max_tensors):
        name, dtype, shape, codec, size_bytes = _checked_entry(fields, entry, limits)
        if name in kind.tensor_names:
            data = body[offset : offset + size_bytes]
            tensors[name] = WireTensor(dtype, shape, data, _codec_named(fields, codec))
        offset += size_bytes
    if offset != len(body):
        fields.refuse(f"a body of the {offset} bytes that its tensors take, got {len(body)}")
    return _Tensors(tensors, fields)


def _checked_entry(fields: Fields, entry: object, limits: WireLimits) -> tuple[str, str, tuple[int, ...], str, int]:
    """One entry of `tensors`, within the limits: checked before anything is allocated for it."""
    if isinstance(entry, list) and list(map(type, entry)) == _ENTRY_TYPES:  # a sequence pattern takes 5 times as long
        name, dtype, sizes, codec, size_bytes = entry
        if (
            len(sizes) <= limits.max_dimensions
            and all(type(size) is int and 0 <= size <= MAX_SIZE for size in sizes)
            and math.prod(sizes) * ITEM_BYTES.get(dtype, 1) <= limits.max_tensor_bytes
            and 0 <= size_bytes <= limits.max_tensor_bytes
        ):
            return name, dtype, tuple(sizes), codec, size_bytes
    fields.refuse(
        f"tensors to be lists [name, dtype, sizes, codec, bytes] of at most {limits.max_dimensions} dimensions and "
        f"{limits.max_tensor_bytes} bytes, got {reprlib.repr(entry)}"
    )


def _codec_named(fields: Fields, name: str) -> Codec:
    if name not in _CODECS:
        fields.refuse(f"codec to be one of {', '.join(_CODECS)}, got {name[:32]!r}")
    return _CODECS[name]


def _error_values(message: ErrorReply) -> dict[str, Any]:
    values: dict[str, Any] = {"code": message.code.value, "message": message.message}
    if message.step_id is not None:
        values["step_id"] = message.step_id
    return values


def _read_error(fields: Fields, _: _Tensors) -> ErrorReply:
    return ErrorReply(
        code=_ERROR_CODES.get(fields.text("code"), ErrorCode.INTERNAL),
        message=fields.text("message", default=""),
        step_id=fields.integer("step_id") if fields.has("step_id") else None,
    )


def _no_values(_: Message) -> dict[str, Any]:
    return {}


def _read_info_request(_: Fields, __: _Tensors) -> InfoRequest:
    return InfoRequest()


def _info_values(message: InfoReply) -> dict[str, Any]:
    values = {
        "info": server_info_values(message.info),
        "protocol_version": message.protocol_version,
        "peers": {peer_id: list(addresses) for peer_id, addresses in message.peers.items()},
    }
    if message.load is not None:
        values["load"] = server_load_values(message.load)
    return values


def _read_info(fields: Fields, _: _Tensors) -> InfoReply:
    peers = Fields(dict(fields.mapping("peers", MAX_PEERS_TOLD)), "peers", fields.peer_id)
    return InfoReply(
        info=read_server_info(fields.nested("info")),
        protocol_version=fields.integer("protocol_version"),
        peers={
            PeerId(peer_id): peers.texts(peer_id, MAX_ADDRESSES, MAX_ADDRESS_CHARACTERS)
            for peer_id in fields.mapping("peers", MAX_PEERS_TOLD)
        },
        load=read_server_load(fields.nested("load")) if fields.has("load") else None,
    )


def _open_session_values(message: OpenSession) -> dict[str, Any]:
    values = {
        "session_id": message.session_id,
        "model_id": message.model_id,
        "span": [message.span.start, message.span.end],
        "max_length": message.max_length,
        "batch_size": message.batch_size,
        "codec": message.codec.value,
        "adapter": message.adapter,
        "alloc_timeout_s": message.alloc_timeout_s,
        "first_tokens": message.first_tokens,
    }
    return values | tuning_values("tuning", message.tuning)


def _read_open_session(fields: Fields, tensors: _Tensors) -> OpenSession:
    return OpenSession(
        session_id=SessionId(fields.text("session_id")),
        model_id=ModelId(fields.text("model_id")),
        span=fields.span("span"),
        max_length=fields.integer("max_length"),
        batch_size=fields.integer("batch_size"),
        codec=_codec_named(fields, fields.text("codec", default=Codec.NONE.value)),
        adapter=fields.text("adapter") if fields.has("adapter") else None,
        alloc_timeout_s=fields.number("alloc_timeout_s", default=0.0),
        first_tokens=fields.integer("first_tokens", default=0),
        tuning=read_tuning(fields, "tuning", tensors.optional("tuning")),
    )


def _session_opened_values(message: SessionOpened) -> dict[str, Any]:
    return {"session_id": message.session_id}


def _read_session_opened(fields: Fields, _: _Tensors) -> SessionOpened:
    return SessionOpened(SessionId(fields.text("session_id")))


def _step_values(message: Step | PushedStep) -> dict[str, Any]:
    values: dict[str, Any] = {"step_id": message.step_id, "position": message.position}
    if message.push_to is not None:
        values["push_to"] = {
            "peer_id": message.push_to.peer_id,
            "session_id": message.push_to.session_id,
            "addresses": message.push_to.addresses,
        }
    return values


def _read_next_hop(fields: Fields) -> NextHop | None:
    if not fields.has("push_to"):
        return None
    hop = fields.nested("push_to")
    return NextHop(
        peer_id=PeerId(hop.text("peer_id")),
        session_id=SessionId(hop.text("session_id")),
        addresses=hop.texts("addresses", MAX_NEXT_HOP_ADDRESSES, MAX_NEXT_HOP_ADDRESS_CHARACTERS),
    )


def _read_step(fields: Fields, tensors: _Tensors) -> Step:
    return Step(
        step_id=fields.integer("step_id"),
        position=fields.integer("position"),
        hidden_states=tensors.required("hidden_states"),
        attention_mask=tensors.optional("attention_mask"),
        position_ids=tensors.optional("position_ids"),
        beam_indices=tensors.optional("beam_indices"),
        push_to=_read_next_hop(fields),
    )


def _pushed_step_values(message: PushedStep) -> dict[str, Any]:
    return {**_step_values(message), "num_tokens": message.num_tokens}


def _read_pushed_step(fields: Fields, tensors: _Tensors) -> PushedStep:
    return PushedStep(
        step_id=fields.integer("step_id"),
        position=fields.integer("position"),
        num_tokens=fields.integer("num_tokens"),
        attention_mask=tensors.optional("attention_mask"),
        position_ids=tensors.optional("position_ids"),
        beam_indices=tensors.optional("beam_indices"),
        push_to=_read_next_hop(fields),
    )


def _step_reply_values(message: StepReply) -> dict[str, Any]:
    values: dict[str, Any] = {"step_id": message.step_id, "position": message.position}
    if message.from_push:
        values["from_push"] = True
    return values


def _read_step_reply(fields: Fields, tensors: _Tensors) -> StepReply:
    return StepReply(
        step_id=fields.integer("step_id"),
        position=fields.integer("position"),
        hidden_states=tensors.required("hidden_states"),
        from_push=fields.boolean("from_push", default=False),
    )


def _push_values(message: Push) -> dict[str, Any]:
    return {"session_id": message.session_id, "step_id": message.step_id}


def _read_push(fields: Fields, tensors: _Tensors) -> Push:
    return Push(SessionId(fields.text("session_id")), fields.integer("step_id"), tensors.required("hidden_states"))


def _read_push_reply(_: Fields, __: _Tensors) -> PushReply:
    return PushReply()


def _batch_values(message: Forward | Backward) -> dict[str, Any]:
    values = {
        "model_id": message.model_id,
        "span": [message.span.start, message.span.end],
        "codec": message.codec.value,
        "adapter": message.adapter,
    }
    return values | tuning_values("tuning", message.tuning)


def _read_forward(fields: Fields, tensors: _Tensors) -> Forward:
    return Forward(
        model_id=ModelId(fields.text("model_id")),
        span=fields.span("span"),
        hidden_states=tensors.required("hidden_states"),
        attention_mask=tensors.optional("attention_mask"),
        position_ids=tensors.optional("position_ids"),
        codec=_codec_named(fields, fields.text("codec", default=Codec.NONE.value)),
        adapter=fields.text("adapter") if fields.has("adapter") else None,
        tuning=read_tuning(fields, "tuning", tensors.optional("tuning")),
    )


def _read_forward_reply(_: Fields, tensors: _Tensors) -> ForwardReply:
    return ForwardReply(tensors.required("hidden_states"))


def _read_backward(fields: Fields, tensors: _Tensors) -> Backward:
    return Backward(
        model_id=ModelId(fields.text("model_id")),
        span=fields.span("span"),
        hidden_states=tensors.required("hidden_states"),
        grad_outputs=tensors.required("grad_outputs"),
        attention_mask=tensors.optional("attention_mask"),
        position_ids=tensors.optional("position_ids"),
        codec=_codec_named(fields, fields.text("codec", default=Codec.NONE.value)),
        adapter=fields.text("adapter") if fields.has("adapter") else None,
        tuning=read_tuning(fields, "tuning", tensors.optional("tuning")),
    )


def _backward_reply_values(message: BackwardReply) -> dict[str, Any]:
    return tuning_values("grad_tuning", message.grad_tuning)


def _read_backward_reply(fields: Fields, tensors: _Tensors) -> BackwardReply:
    return BackwardReply(
        tensors.required("grad_inputs"), read_tuning(fields, "grad_tuning", tensors.optional("grad_tuning"))
    )


def _speed_test_values(message: SpeedTest) -> dict[str, Any]:
    return {"answer_bytes": message.answer_bytes}


def _read_speed_test(fields: Fields, tensors: _Tensors) -> SpeedTest:
    return SpeedTest(tensors.required("data"), fields.integer("answer_bytes"))


def _read_speed_test_reply(_: Fields, tensors: _Tensors) -> SpeedTestReply:
    return SpeedTestReply(tensors.required("data"))


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one type of message is written and read."""

    name: str
    message_class: type[Message]
    values: Callable[[Any], dict[str, Any]]
    read: Callable[[Fields, _Tensors], Message]
    tensor_names: tuple[str, ...] = ()


_STEP_TENSORS = ("position_ids", "beam_indices", "hidden_states", "attention_mask")
"""Widest elements first, so that each tensor lies aligned for its dtype without padding."""
_PUSHED_STEP_TENSORS = ("position_ids", "beam_indices", "attention_mask")
_FORWARD_TENSORS = ("position_ids", "tuning", "hidden_states", "attention_mask")
_BACKWARD_TENSORS = ("position_ids", "tuning", "hidden_states", "grad_outputs", "attention_mask")
_BACKWARD_REPLY_TENSORS = ("grad_tuning", "grad_inputs")

_KINDS = (
    _Kind("error", ErrorReply, _error_values, _read_error),
    _Kind("info_request", InfoRequest, _no_values, _read_info_request),
    _Kind("info_reply", InfoReply, _info_values, _read_info),
    _Kind("open_session", OpenSession, _open_session_values, _read_open_session, ("tuning",)),
    _Kind("session_opened", SessionOpened, _session_opened_values, _read_session_opened),
    _Kind("step", Step, _step_values, _read_step, _STEP_TENSORS),
    _Kind("pushed_step", PushedStep, _pushed_step_values, _read_pushed_step, _PUSHED_STEP_TENSORS),
    _Kind("step_reply", StepReply, _step_reply_values, _read_step_reply, ("hidden_states",)),
    _Kind("push", Push, _push_values, _read_push, ("hidden_states",)),
    _Kind("push_reply", PushReply, _no_values, _read_push_reply),
    _Kind("forward", Forward, _batch_values, _read_forward, _FORWARD_TENSORS),
    _Kind("forward_reply", ForwardReply, _no_values, _read_forward_reply, ("hidden_states",)),
    _Kind("backward", Backward, _batch_values, _read_backward, _BACKWARD_TENSORS),
    _Kind("backward_reply", BackwardReply, _backward_reply_values, _read_backward_reply, _BACKWARD_REPLY_TENSORS),
    _Kind("speed_test", SpeedTest, _speed_test_values, _read_speed_test, ("data",)),
    _Kind("speed_test_reply", SpeedTestReply, _no_values, _read_speed_test_reply, ("data",)),
)
_KINDS_BY_NAME = {kind.name: kind for kind in _KINDS}
_KINDS_BY_CLASS: dict[type[Message], _Kind] = {kind.message_class: kind for kind in _KINDS}
