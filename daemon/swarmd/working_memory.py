"""How much memory a pass through a model takes beside weights and KV cache, measured by running one.

Counted are the bytes of all tensors that live at the same time, as torch makes and frees them, so that the figure is
exact and the same on every machine; scratch space within one operation is not seen.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from p2pswarm.blocks.span_model import SpanModel

MEASURED_MULTIPLICATIONS = 5e8
"""As many as one core manages in some hundredths of a second."""


def working_memory_bytes(model: SpanModel, num_weights: int, max_tokens: int) -> int:
    """What a pass of `max_tokens` tokens takes, by two shorter ones: something fixed, and so much a token.

    The model has `num_weights` weights, by which the shorter ones are kept short.
    """
    num_tokens = max(1, min(max_tokens // 2, int(MEASURED_MULTIPLICATIONS / max(num_weights, 1))))
    short, long = (_pass_bytes(model, tokens) for tokens in (num_tokens, 2 * num_tokens))
    return long + max(0, long - short) * (max_tokens - 2 * num_tokens) // num_tokens


def _pass_bytes(model: SpanModel, num_tokens: int) -> int:
    hidden_states = torch.zeros(1, num_tokens, model.hidden_size)
    return peak_tensor_bytes(lambda: model.run(hidden_states, None, position=0))


def peak_tensor_bytes(function: Callable[[], object]) -> int:
    """The most bytes that tensors made by `function` take at any one time."""
    with _LiveTensors() as live, torch.inference_mode():
        function()
    peak_bytes: int = live.peak_bytes
    return peak_bytes


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
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
            self._live_bytes -= num_bytes
            del self._known[address]

        self._known[address] = weakref.ref(storage, forget)
        self._live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
