"""What a server refuses of a client's request, and why: facts in, `BadRequest` out. Nothing is touched before these
have passed.

Shapes and dtypes that no server could take are refused where a message is made (`wire/messages.py`); here come the
facts of this model, this span and this session.
"""

import math
from collections.abc import Sequence

import torch

from p2pswarm.core.errors import BadRequest
from p2pswarm.core.ids import ModelId
from p2pswarm.core.span import Span
from p2pswarm.wire.codecs import decode_tensor, is_finite
from p2pswarm.wire.messages import OpenSession, Step, WireTensor
from p2pswarm.wire.tensor_rows import rows_of

CHECKED_ELEMENTS = 1 << 22
"""Looked at together: 16 MiB."""


def check_model(wanted: ModelId, served: ModelId) -> None:
    """Refuses a request for another model, or for another revision of ours."""
    if wanted == served:
        return
    same_name = wanted.rpartition("@")[0] == served.rpartition("@")[0]
    reason = " (the same name, but other weights or another config)" if same_name else ""
    raise BadRequest(f"this server has model {served}, asked was {wanted}{reason}")


def check_span(wanted: Span, served: Span) -> None:
    if not served.contains(wanted):
        raise BadRequest(f"this server has blocks {served}, asked were {wanted}")


def check_adapter(wanted: str | None, served: Sequence[str]) -> None:
    if wanted is not None and wanted not in served:
        has = f"the adapters {', '.join(served)}" if served else "no adapters"
        raise BadRequest(f"this server has {has}, asked was {wanted}")


def check_open(request: OpenSession, *, max_length: int) -> None:
    if request.max_length > max_length:
        raise BadRequest(f"this server takes sessions of up to {max_length} tokens, asked were {request.max_length}")


def check_hidden_size(hidden_states: WireTensor, hidden_size: int) -> None:
    if hidden_states.shape[2] != hidden_size:
        raise BadRequest(f"this model has hidden states of size {hidden_size}, got shape {list(hidden_states.shape)}")


def check_step(step: Step, *, batch_size: int, length: int, max_length: int, hidden_size: int) -> None:
    """Refuses a step that does not fit the session as it stands, with `length` tokens in its cache."""
    check_hidden_size(step.hidden_states, hidden_size)
    if step.hidden_states.shape[0] != batch_size:
        raise BadRequest(f"this session has batch size {batch_size}, got shape {list(step.hidden_states.shape)}")
    if step.position > length:
        raise BadRequest(f"position {step.position} is beyond the {length} tokens in the cache")
    if step.position + step.num_tokens > max_length:
        raise BadRequest(
            f"position {step.position} and {step.num_tokens} new tokens exceed this session's {max_length} tokens"
        )


def check_length(hidden_states: WireTensor, max_length: int) -> None:
    """Of rows without a session."""
    num_tokens = hidden_states.shape[1]
    if not 1 <= num_tokens <= max_length:
        raise BadRequest(f"this server takes sequences of 1 to {max_length} tokens, got {num_tokens}")


def check_trains(can_train: bool) -> None:
    if not can_train:
        raise BadRequest("no gradients come back through this model, which works on hidden states between its blocks")


def check_finite(wire: WireTensor, name: str) -> None:
    """Refuses NaN and infinity, looking at some rows at a time: decoded, a tensor may be four times as large."""
    num_rows = wire.shape[0]
    rows_at_a_time = max(1, CHECKED_ELEMENTS * num_rows // math.prod(wire.shape))
    for start in range(0, num_rows, rows_at_a_time):
        read_hidden_states(rows_of(wire, start, min(start + rows_at_a_time, num_rows)), name)


def read_hidden_states(wire: WireTensor, name: str = "hidden_states") -> torch.Tensor:
    """The decoded tensor, every value of it finite: one NaN would stay in the cache for the rest of the session."""
    hidden_states = decode_tensor(wire)
    # One pass: the sum is NaN or infinite if any value is. Finite values whose sum is not are rare, so look only then.
    if not hidden_states.sum(dtype=torch.float32).isfinite() and not hidden_states.isfinite().all():
        raise BadRequest(f"{name} hold NaN or infinity")
    return hidden_states


def read_position_ids(wire: WireTensor | None, max_length: int) -> torch.Tensor | None:
    """The decoded position ids, each below `max_length`: an index beyond a table would stop a GPU's whole process."""
    return _read_indices(wire, "position_ids", max_length)


def read_beam_indices(wire: WireTensor | None, batch_size: int) -> torch.Tensor | None:
    return _read_indices(wire, "beam_indices", batch_size)


def read_mask(wire: WireTensor | None) -> torch.Tensor | None:
    """The decoded attention mask; None also for one that leaves no token out."""
    if wire is None:
        return None
    mask = decode_tensor(wire)
    return None if bool(mask.all()) else mask


def checked_answer(name: str, answer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The answer, every value of it finite: where what came was finite too, it was too large to compute with."""
    if not is_finite(answer):
        computed_in = str(dtype).removeprefix("torch.")
        raise BadRequest(
            f"the {name} hold NaN or infinity: what was sent, or the tuning, is too large to compute with in "
            f"{computed_in}"
        )
    return answer


def _read_indices(wire: WireTensor | None, name: str, end: int) -> torch.Tensor | None:
    if wire is None:
        return None
    indices = decode_tensor(wire)
    if indices.numel():
        lowest, highest = (int(bound) for bound in indices.aminmax())
        if lowest < 0 or highest >= end:
            raise BadRequest(f"{name} go from 0 up to {end - 1} here, got {lowest} to {highest}")
    return indices
