"""Every message two nodes exchange over an RPC stream: one frozen dataclass each, checked where it is made.

Knows nothing of bytes (`wire/frames.py`, `wire/serialization.py`) nor of torch (`wire/codecs.py`): a tensor here is a
`WireTensor`, a dtype, a shape and a buffer. A stream carries either unary calls, one answer per request in order, or, after an
`OpenSession`, the steps of one session.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span


class Codec(Enum):
    """How a float tensor is written. `NONE` keeps every bit; the others are chosen by the client, never silently."""

    NONE = "none"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    BLOCKWISE_INT8 = "blockwise_int8"


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as it travels: raw little-endian bytes in row-major order."""

    dtype: str
    """Of the decoded tensor: `float32 float16 bfloat16 int64 bool`."""
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview
    codec: Codec = Codec.NONE


class ErrorCode(Enum):
    """Whose fault it was, for the reader of an `ErrorReply`."""

    BAD_REQUEST = "bad_request"
    """The request was wrong; sending it again, here or elsewhere, cannot help."""
    UNKNOWN_MESSAGE = "unknown_message"
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


@dataclass(frozen=True, slots=True)
class InfoRequest:
    """What are you, and what do you serve?"""


@dataclass(frozen=True, slots=True)
class InfoReply:
    info: ServerInfo
    protocol_version: int
    peers: Mapping[PeerId, tuple[str, ...]] = field(default_factory=dict)
    """Other nodes the server knows, so that a client can survive the loss of its bootstrap peer."""


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


@dataclass(frozen=True, slots=True)
class SessionOpened:
    session_id: SessionId


@dataclass(frozen=True, slots=True)
class Step:
    """Runs new tokens through the session's span, in its KV cache."""

    step_id: int
    """Rises by one from 0 within a stream; echoed in the answer."""
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


@dataclass(frozen=True, slots=True)
class StepReply:
    step_id: int
    position: int
    """Tokens in the cache after the step."""
    hidden_states: WireTensor


@dataclass(frozen=True, slots=True)
class Forward:
    """Runs a whole batch through the span without a cache."""

    model_id: ModelId
    span: Span
    hidden_states: WireTensor
    attention_mask: WireTensor | None = None
    position_ids: WireTensor | None = None
    codec: Codec = Codec.NONE


@dataclass(frozen=True, slots=True)
class ForwardReply:
    hidden_states: WireTensor


Message = (
    ErrorReply
    | InfoRequest
    | InfoReply
    | OpenSession
    | SessionOpened
    | Step
    | StepReply
    | Forward
    | ForwardReply
)
