"""How much memory passes through a model take beside weights and KV cache, measured by running some.

Counted are the bytes of all tensors that live at the same time, as torch makes and frees them, so that the figure is
exact and the same on every machine; scratch space within one operation is not seen.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from p2pswarm.blocks.span_backward import RoundTrip, num_stages
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.core.span import Span
from swarmd.training_memory import BackwardMemory, Growth

MEASURED_MULTIPLICATIONS = 5e8
"""As many as one core manages in some hundredths of a second."""
MAX_MEASURED_ROW = 8
"""Tokens of the shortest row whose gradients are computed; the longest has four times as many."""


def working_memory_bytes(model: SpanModel, num_weights: int, max_tokens: int) -> int:
    """What a pass of `max_tokens` tokens takes, by two shorter ones: something fixed, and so much a token.

    The model has `num_weights` weights, by which the shorter ones are kept short.
    """
    num_tokens = max(1, min(max_tokens // 2, int(MEASURED_MULTIPLICATIONS / max(num_weights, 1))))
    short, long = (_pass_bytes(model, tokens) for tokens in (num_tokens, 2 * num_tokens))
    return long + max(0, long - short) * (max_tokens - 2 * num_tokens) // num_tokens


def backward_memory(model: SpanModel) -> BackwardMemory:
    """What gradients take, in the kind of block in which they take most, by those of three rows, of which each is twice
    as long as the one before.

    They are short, by the weights that a block of this size usually has. What grows with the square of the length is
    little in short rows; so it is looked for at every moment, and not only at those that take most.
    """
    if not model.can_train:
        return BackwardMemory()
    kinds = [_block_memory(model, index) for index in model.unlike_blocks()]
    return BackwardMemory(
        max(kind.fixed_bytes for kind in kinds),
        _largest({moment for kind in kinds for moment in kind.moments}),
        state_bytes=model.hidden_size * model.dtype.itemsize,
        notes=Growth(max(kind.notes.token_bytes for kind in kinds), max(kind.notes.square_bytes for kind in kinds)),
        fixed_notes_bytes=max(kind.fixed_notes_bytes for kind in kinds),
    )


def _block_memory(model: SpanModel, index: int) -> BackwardMemory:
    num_weights = 12 * model.hidden_size**2
    num_tokens = max(2, min(MAX_MEASURED_ROW, int(MEASURED_MULTIPLICATIONS / 16 / num_weights)))
    histories = [backward_history(model, index, num_tokens * factor) for factor in (1, 2, 4)]
    if len({len(history) for history in histories}) > 1:  # it does something else with longer rows
        histories = [[max(history)] for history in histories]
    fits = [_fit(num_tokens, *sizes) for sizes in zip(*histories, strict=True)]
    fixed_notes_bytes, notes = _fit(
        num_tokens, *(notes_bytes(model, index, num_tokens * factor) for factor in (1, 2, 4))
    )
    return BackwardMemory(
        math.ceil(max(0.0, *(fixed_bytes for fixed_bytes, _ in fits))),
        tuple(growth for _, growth in fits),
        notes=notes,
        fixed_notes_bytes=math.ceil(fixed_notes_bytes),
    )


def _fit(num_tokens: int, short: int, middle: int, long: int) -> tuple[float, Growth]:
    """What is there however short the rows, and how it grows: from rows of so many tokens, twice and four times."""
    square_bytes = (long - 3 * middle + 2 * short) / (6 * num_tokens**2)
    growth = Growth((middle - short) / num_tokens - 3 * num_tokens * square_bytes, square_bytes)
    return short - growth.row_bytes(num_tokens), growth


def _largest(moments: set[Growth]) -> tuple[Growth, ...]:
    """Those that are not below another in both."""
    found: list[Growth] = []
    for moment in sorted(moments, key=lambda moment: (-moment.square_bytes, -moment.token_bytes)):
        if not found or moment.token_bytes > found[-1].token_bytes:
            found.append(moment)
    return tuple(found)


def backward_history(model: SpanModel, index: int, num_tokens: int) -> list[int]:
    """Bytes at each moment while one row goes through that block, all that came for it included."""

    def there_and_back() -> None:
        _one_block_trip(model, index, num_tokens).go_on(num_stages(1, 1))

    return tensor_bytes(there_and_back)


def notes_bytes(model: SpanModel, index: int, num_tokens: int) -> int:
    """What that block has of one row between its way there and its way back, but for what went in and came out."""
    with _LiveTensors() as live, torch.inference_mode():
        trip = _one_block_trip(model, index, num_tokens)
        came_bytes = live.live_bytes
        trip.go_on(1)
        added_bytes: int = live.live_bytes - came_bytes
    return added_bytes - num_tokens * model.hidden_size * model.dtype.itemsize


def _one_block_trip(model: SpanModel, index: int, num_tokens: int) -> RoundTrip:
    """One row's. Some of it is padding, since masks take memory too."""
    mask = torch.ones(1, num_tokens, dtype=torch.bool)
    mask[:, : num_tokens // 2] = False
    states, gradients = (torch.zeros(1, num_tokens, model.hidden_size) for _ in range(2))
    return model.start_backward(states, gradients, attention_mask=mask, blocks=Span(index, index + 1))


def _pass_bytes(model: SpanModel, num_tokens: int) -> int:
    hidden_states = torch.zeros(1, num_tokens, model.hidden_size)
    return peak_tensor_bytes(lambda: model.run(hidden_states, None, position=0))


def peak_tensor_bytes(function: Callable[[], object]) -> int:
    """The most bytes that tensors made by `function` take at any one time."""
    return max(tensor_bytes(function), default=0)


def tensor_bytes(function: Callable[[], object]) -> list[int]:
    """How many bytes tensors made by `function` take, after each operation."""
    with _LiveTensors() as live, torch.inference_mode():
        function()
    history: list[int] = live.history
    return history


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.history: list[int] = []
        self.live_bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        """By address: those that live, and those that were there before."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping imports torch's compiler, which takes a second

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        for tensor in tree_iter((arguments, named)):
            self._note(tensor, counted_bytes=0)
        result = function(*arguments, **named)
        for tensor in tree_iter(result):
            self._note(tensor)
        self.history.append(self.live_bytes)
        return result

    def _note(self, tensor: object, counted_bytes: int | None = None) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        num_bytes = storage.nbytes() if counted_bytes is None else counted_bytes

        def forget(_: object) -> None:
            self.live_bytes -= num_bytes
            del self._known[address]

        self._known[address] = weakref.ref(storage, forget)
        self.live_bytes += num_bytes
