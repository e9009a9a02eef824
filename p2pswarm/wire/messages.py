"""Every message two nodes exchange over an RPC stream: one frozen dataclass each, checked where it is made.

Knows nothing of bytes (`wire/frames.py`, `wire/serialization.py`) nor of torch (`wire/codecs.py`): a tensor here is a
`WireTensor` (`wire/tensors.py`), and what a client brings along to the blocks it uses a `WireTuning`
(`wire/tuning.py`). A stream carries either unary calls, one answer per request in order, or, after an `OpenSession`,
the steps of one session. What cannot be right whoever sent it raises `ConfigError` here (reading a peer's bytes turns
it into `MalformedMessage`); what depends on the model or the session is for the server to refuse.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.server_load import ServerLoad
from p2pswarm.core.span import Span
from p2pswarm.wire.fields import MAX_TEXT_CHARACTERS, is_identifier
from p2pswarm.wire.frames import DEFAULT_LIMITS

# Parts of the messages, which whoever makes one finds here too.
from p2pswarm.wire.tensors import FLOAT_DTYPES as FLOAT_DTYPES
from p2pswarm.wire.tensors import ITEM_BYTES as ITEM_BYTES
from p2pswarm.wire.tensors import Codec as Codec
from p2pswarm.wire.tensors import WireTensor as WireTensor
from p2pswarm.wire.tensors import encoded_num_bytes as encoded_num_bytes
from p2pswarm.wire.tuning import WireTuning

PROTOCOL_VERSION = 4
"""Goes up when messages or fields are added; what breaks older nodes gets a new protocol id instead."""
MIN_PROTOCOL_VERSION = 1
"""The oldest version this node still talks to."""
PUSH_VERSION = 2
"""The first version whose servers push, and take what others push."""
TUNING_VERSION = 4
"""The first version whose servers answer `Backward` and apply what a client brings along. Older ones pass it over."""

MAX_BATCH_SIZE = 1 << 16
MAX_LENGTH = 1 << 24
"""Tokens: far above any model's context; keeps position arithmetic small."""
MAX_ALLOC_TIMEOUT_S = 3600.0
"""A client that would wait longer for room may ask again."""
MAX_STEP_ID = (1 << 63) - 1
MAX_SPEED_TEST_BYTES = 2 << 20
"""In each direction: a sixth of a second at 100 Mbit/s."""
MAX_BODY_BYTES = DEFAULT_LIMITS.max_frame_bytes - DEFAULT_LIMITS.max_header_bytes
"""Tensors of one message together, so that its frame is taken whatever its header says."""
MAX_NEXT_HOP_ADDRESSES = 8
MAX_NEXT_HOP_ADDRESS_CHARACTERS = 256


class ErrorCode(Enum):
    """Whose fault it was, for the reader of an `ErrorReply`."""

    BAD_REQUEST = "bad_request"
    """The request was wrong; sending it again, here or elsewhere, cannot help."""
    UNKNOWN_MESSAGE = "unknown_message"
    UNSUPPORTED_VERSION = "unsupported_version"
    """The sender's protocol version is older than what this node talks to."""
    BUSY = "busy"
    """No room now: try another server, or later."""
    SESSION_LOST = "session_lost"
    """The server dropped the session (timeout, drain): replay it elsewhere."""
    DRAINING = "draining"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class ErrorReply:
    code: ErrorCode
    message: str
    step_id: int | None = None
    """Of the step that it answers, in a session."""

    def __post_init__(self) -> None:
        if len(self.message) > MAX_TEXT_CHARACTERS:
            raise ConfigError(f"an error message has at most {MAX_TEXT_CHARACTERS} characters, got {len(self.message)}")
        if self.step_id is not None:
            _check_range(self.step_id, 0, MAX_STEP_ID, "step_id")

    @classmethod
    def shortened(cls, code: ErrorCode, message: str) -> "ErrorReply":
        """With as much of the message as fits."""
        return cls(code, message[:MAX_TEXT_CHARACTERS])


@dataclass(frozen=True, slots=True)
class InfoRequest:
    """What are you, and what do you serve?"""


@dataclass(frozen=True, slots=True)
class InfoReply:
    info: ServerInfo
    protocol_version: int = PROTOCOL_VERSION
    peers: Mapping[PeerId, tuple[str, ...]] = field(default_factory=dict)
    """Other nodes the server knows, so that a client can survive the loss of its bootstrap peer."""
    load: ServerLoad | None = None


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Asks for a KV cache over `span`; the stream then belongs to this session."""

    session_id: SessionId
    model_id: ModelId
    span: Span
    max_length: int
    """Tokens per sequence, prompt and generated ones together."""
    batch_size: int
    codec: Codec = Codec.NONE
    """For the hidden states of the answers."""
    adapter: str | None = None
    alloc_timeout_s: float = 0.0
    """How long the client waits for room where there is none at once."""
    first_tokens: int = 0
    """Tokens per sequence that come at once, a prompt or a replay: there has to be room for these."""
    tuning: WireTuning | None = None
    """All steps run through it; its prompts are for the positions 0, 1, ..."""

    def __post_init__(self) -> None:
        _check_identifier(self.session_id, "session_id")
        _check_identifier(self.model_id, "model_id")
        _check_range(self.max_length, 1, MAX_LENGTH, "max_length")
        _check_range(self.batch_size, 1, MAX_BATCH_SIZE, "batch_size")
        _check_range(self.first_tokens, 0, self.max_length, "first_tokens")
        if not 0 <= self.alloc_timeout_s <= MAX_ALLOC_TIMEOUT_S:
            raise ConfigError(
                f"alloc_timeout_s is a number of seconds from 0 to {MAX_ALLOC_TIMEOUT_S:g}, got {self.alloc_timeout_s}"
            )
        if self.adapter is not None:
            _check_identifier(self.adapter, "adapter")
        if self.tuning is not None:
            self.tuning.check_fits(self.span)


@dataclass(frozen=True, slots=True)
class SessionOpened:
    session_id: SessionId

    def __post_init__(self) -> None:
        _check_identifier(self.session_id, "session_id")


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where a server hands its output on to, besides answering its client."""

    peer_id: PeerId
    session_id: SessionId
    """Of the session there: a secret of its client, of that server, and of whoever may push to it."""
    addresses: tuple[str, ...] = ()
    """Multiaddrs at which the peer can be dialled; none where the server knows them already."""

    def __post_init__(self) -> None:
        _check_identifier(self.peer_id, "peer_id")
        _check_identifier(self.session_id, "session_id")
        if len(self.addresses) > MAX_NEXT_HOP_ADDRESSES:
            raise ConfigError(f"a next hop has at most {MAX_NEXT_HOP_ADDRESSES} addresses, got {len(self.addresses)}")


@dataclass(frozen=True, slots=True)
class Step:
    """Runs new tokens through the session's span, in its KV cache."""

    step_id: int
    """Rises with each step of a stream; echoed in the answer."""
    position: int
    """Tokens in the cache before this step. Below what the server holds: it rolls back to here first."""
    hidden_states: WireTensor
    """[batch, tokens, hidden]; zero tokens only roll back or reorder."""
    attention_mask: WireTensor | None = None
    """bool [batch, tokens]: which of the new tokens count (False: padding). None: all of them."""
    position_ids: WireTensor | None = None
    """int64 [batch, tokens]. None: position, position + 1, ..."""
    beam_indices: WireTensor | None = None
    """int64 [batch]: row i of the cache becomes the old row `beam_indices[i]`, before the step."""
    push_to: NextHop | None = None
    """Who is handed the output, as the input of the step with the same id."""

    def __post_init__(self) -> None:
        _check_range(self.step_id, 0, MAX_STEP_ID, "step_id")
        _check_range(self.position, 0, MAX_LENGTH, "position")
        _check_hidden_states(self.hidden_states)
        batch_size, num_tokens, _ = self.hidden_states.shape
        _check_tensor(self.attention_mask, "attention_mask", "bool", (batch_size, num_tokens))
        _check_tensor(self.position_ids, "position_ids", "int64", (batch_size, num_tokens))
        _check_tensor(self.beam_indices, "beam_indices", "int64", (batch_size,))

    @property
    def num_tokens(self) -> int:
        """New tokens per sequence."""
        return self.hidden_states.shape[1]


@dataclass(frozen=True, slots=True)
class PushedStep:
    """A step whose hidden states come from the server before, by `Push`.

    The same step as a whole `Step` may follow, where they do not come; whichever is first is run, and answered.
    """

    step_id: int
    position: int
    num_tokens: int
    """New tokens per sequence."""
    attention_mask: WireTensor | None = None
    position_ids: WireTensor | None = None
    beam_indices: WireTensor | None = None
    push_to: NextHop | None = None

    def __post_init__(self) -> None:
        _check_range(self.step_id, 0, MAX_STEP_ID, "step_id")
        _check_range(self.position, 0, MAX_LENGTH, "position")
        _check_range(self.num_tokens, 0, MAX_LENGTH, "num_tokens")
        tensors = (self.attention_mask, self.position_ids, self.beam_indices)
        batch_size = next((tensor.shape[0] for tensor in tensors if tensor is not None and tensor.shape), 0)
        _check_tensor(self.attention_mask, "attention_mask", "bool", (batch_size, self.num_tokens))
        _check_tensor(self.position_ids, "position_ids", "int64", (batch_size, self.num_tokens))
        _check_tensor(self.beam_indices, "beam_indices", "int64", (batch_size,))

    def with_hidden_states(self, hidden_states: WireTensor) -> Step:
        """The whole step. Raises `ConfigError` where the hidden states do not fit."""
        step = Step(
            self.step_id,
            self.position,
            hidden_states,
            self.attention_mask,
            self.position_ids,
            self.beam_indices,
            self.push_to,
        )
        if step.num_tokens != self.num_tokens:
            raise ConfigError(f"wanted hidden states of {self.num_tokens} tokens, got {step.num_tokens}")
        return step


@dataclass(frozen=True, slots=True)
class StepReply:
    step_id: int
    position: int
    """Tokens in the cache after the step."""
    hidden_states: WireTensor
    from_push: bool = False
    """Whether the hidden states that were run came by push."""

    def __post_init__(self) -> None:
        _check_range(self.step_id, 0, MAX_STEP_ID, "step_id")
        _check_range(self.position, 0, MAX_LENGTH, "position")
        _check_hidden_states(self.hidden_states)


@dataclass(frozen=True, slots=True)
class Push:
    """From server to server: the input of a step that the session's client has announced there, or soon will."""

    session_id: SessionId
    step_id: int
    hidden_states: WireTensor

    def __post_init__(self) -> None:
        _check_identifier(self.session_id, "session_id")
        _check_range(self.step_id, 0, MAX_STEP_ID, "step_id")
        _check_hidden_states(self.hidden_states)


@dataclass(frozen=True, slots=True)
class PushReply:
    """The push was taken, or is not needed any more."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Runs a whole batch through the span without a cache."""

    model_id: ModelId
    span: Span
    hidden_states: WireTensor
    """[batch, tokens, hidden]"""
    attention_mask: WireTensor | None = None
    """bool [batch, tokens]"""
    position_ids: WireTensor | None = None
    """int64 [batch, tokens]"""
    codec: Codec = Codec.NONE
    """For the hidden states of the answer."""
    adapter: str | None = None
    tuning: WireTuning | None = None

    def __post_init__(self) -> None:
        _check_batch(self)


@dataclass(frozen=True, slots=True)
class ForwardReply:
    hidden_states: WireTensor

    def __post_init__(self) -> None:
        _check_hidden_states(self.hidden_states)


@dataclass(frozen=True, slots=True)
class Backward:
    """Runs a `Forward` once more and goes back through it; the server has kept nothing of that call."""

    model_id: ModelId
    span: Span
    hidden_states: WireTensor
    """[batch, tokens, hidden]: those of the `Forward`, what entered the span."""
    grad_outputs: WireTensor
    """Shape and dtype of `hidden_states`: the loss's gradient for what the `Forward` answered."""
    attention_mask: WireTensor | None = None
    """bool [batch, tokens]"""
    position_ids: WireTensor | None = None
    """int64 [batch, tokens]"""
    codec: Codec = Codec.NONE
    """For the gradients of the hidden states in the answer."""
    adapter: str | None = None
    tuning: WireTuning | None = None

    def __post_init__(self) -> None:
        _check_batch(self)
        given, gradients = self.hidden_states, self.grad_outputs
        if (gradients.shape, gradients.dtype) != (given.shape, given.dtype):
            raise ConfigError(
                f"grad_outputs are {given.dtype} of shape {list(given.shape)}, as hidden_states, got "
                f"{gradients.dtype} of shape {list(gradients.shape)}"
            )


@dataclass(frozen=True, slots=True)
class BackwardReply:
    grad_inputs: WireTensor
    """Shape and dtype of the request's `hidden_states`."""
    grad_tuning: WireTuning | None = None
    """The gradient of each part of the request's tuning; None where it had none."""

    def __post_init__(self) -> None:
        _check_hidden_states(self.grad_inputs, "grad_inputs")


@dataclass(frozen=True, slots=True)
class SpeedTest:
    """Asks for bytes without meaning, and brings some along: how long both take tells how fast the line is."""

    data: WireTensor
    """bool [bytes]"""
    answer_bytes: int

    def __post_init__(self) -> None:
        _check_speed_test_data(self.data)
        _check_range(self.answer_bytes, 0, MAX_SPEED_TEST_BYTES, "answer_bytes")


@dataclass(frozen=True, slots=True)
class SpeedTestReply:
    data: WireTensor
    """bool [bytes]"""

    def __post_init__(self) -> None:
        _check_speed_test_data(self.data)


Message = (
    ErrorReply
    | InfoRequest
    | InfoReply
    | OpenSession
    | SessionOpened
    | Step
    | PushedStep
    | StepReply
    | Push
    | PushReply
    | Forward
    | ForwardReply
    | Backward
    | BackwardReply
    | SpeedTest
    | SpeedTestReply
)


def _check_range(value: int, minimum: int, maximum: int, name: str) -> None:
    if not minimum <= value <= maximum:
        raise ConfigError(f"{name} is a whole number from {minimum} to {maximum}, got {value}")


def _check_identifier(value: str, name: str) -> None:
    if not is_identifier(value):
        raise ConfigError(f"{name} is short printable ASCII text without spaces, got {value[:64]!r}")


def _check_batch(request: Forward | Backward) -> None:
    """What both directions of a pass through a span ask for."""
    _check_identifier(request.model_id, "model_id")
    if request.adapter is not None:
        _check_identifier(request.adapter, "adapter")
    given = request.hidden_states
    _check_hidden_states(given)
    batch_size, num_tokens, hidden_size = given.shape
    _check_tensor(request.attention_mask, "attention_mask", "bool", (batch_size, num_tokens))
    _check_tensor(request.position_ids, "position_ids", "int64", (batch_size, num_tokens))
    answer_bytes = encoded_num_bytes(given.dtype, given.shape, request.codec)
    if request.tuning is not None:
        request.tuning.check_fits(request.span, hidden_size)
        if isinstance(request, Backward):
            answer_bytes += request.tuning.num_bytes
    if answer_bytes > MAX_BODY_BYTES:
        raise ConfigError(
            f"an answer has at most {MAX_BODY_BYTES} bytes of tensors, to this it would have {answer_bytes}: "
            "send fewer rows at once"
        )


def _check_hidden_states(tensor: WireTensor, name: str = "hidden_states") -> None:
    if tensor.dtype not in FLOAT_DTYPES or len(tensor.shape) != 3 or 0 in (tensor.shape[0], tensor.shape[2]):
        raise ConfigError(
            f"{name} are floats of shape [batch, tokens, hidden], got {tensor.dtype} of shape {list(tensor.shape)}"
        )


def _check_speed_test_data(tensor: WireTensor) -> None:
    if tensor.dtype != "bool" or len(tensor.shape) != 1 or tensor.shape[0] > MAX_SPEED_TEST_BYTES:
        raise ConfigError(
            f"data is bool of one dimension, of at most {MAX_SPEED_TEST_BYTES} bytes, got {tensor.dtype} of shape "
            f"{list(tensor.shape)}"
        )


def _check_tensor(tensor: WireTensor | None, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
        raise ConfigError(
            f"{name} is {dtype} of shape {list(shape)}, as the others of the step have it, got {tensor.dtype} of shape "
            f"{list(tensor.shape)}"
        )
