"""Linear layers laid out for decoding on a CPU, where one token takes as long as reading the weights does.

Two things make that reading faster, and change no module's interface. Layers that are given the same tensor (queries,
keys and values; gate and up) lie side by side in one matrix, and for few tokens the first of them computes all. And
matrices are stored by columns, so that a token's output is a sum of contiguous columns: a kernel of ours adds them up
for one token or a batch of some (`column_kernel.py`). Where it is not to be had, MKL does so for one token, in those
matrices that are wider than high; high ones are left as they are. Prompts go through each layer by itself.

Measured on one core of an AMD EPYC that others used too, tokens through the linear layers of ten blocks of SmolLM2-135M
in float32, in ms of processor time; adding up all weights took 8.4:

| tokens | 1 | 2 | 4 | 8 | 16 |
| --- | --- | --- | --- | --- | --- |
| as loaded | 10.8 | 17.5 | 18.5 | 21.4 | 27.4 |
| packed, by the kernel | 8.2 | 9.1 | 9.6 | 11.1 | 17.6 |

Without the kernel, one token took 7.2 packed where it took 9.3 as loaded. By MKL, high matrices become slower by
columns (1.7 -> 2.3 ms), and so does everything in bfloat16, for which torch has no fast way through columns (6 to 38
times slower). On two threads a step through ten whole blocks takes 11 ms packed for MKL, 15 as loaded: fewer
multiplications wait for one another.

Which layers share an input is seen by running one token; nothing here knows how an architecture names them.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from p2pswarm.blocks.column_kernel import find_column_kernel, new_columns

MAX_THREADS = 2
"""With how many threads the gain was measured."""

MIN_SUMMANDS = 128
"""A column is summed up in parts of at least so many products: one after the other, 576 of them err 2.7 times as far
from the truth as rows do, 144 no further."""

MAX_SMALL_WEIGHT = 1 << 16
"""Numbers in a norm or a bias, at most."""


def pack_weights(model: nn.Module, run_one_token: Callable[[], object]) -> None:
    """Repacks the linear layers of a model that is loaded and never trained; `run_one_token` runs it.

    Takes the memory of one group of layers more for a moment, and none in the end.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and _can_be_packed(module)]
    calls = _record_calls(layers, run_one_token)
    for group in _groups(calls):
        if len(group) > 1:
            _join(group)
        else:
            pack_layer(group[0])
    _copy_small_weights(model)


def _copy_small_weights(model: nn.Module) -> None:
    """So that norms and biases do not keep a whole mapped file in memory, whose other weights have been copied."""
    packed = {id(layer.weight) for layer in model.modules() if isinstance(layer, ColumnLinear | JoinedLinear)}
    for parameter in model.parameters():
        if id(parameter) not in packed and parameter.numel() <= MAX_SMALL_WEIGHT:
            parameter.data = parameter.data.clone()


def pack_layer(layer: nn.Module) -> None:
    """Stores one layer by columns, where that makes it faster. It may be moved, changed and shared as before."""
    if isinstance(layer, nn.Linear) and _can_be_packed(layer) and _pays(layer.in_features, layer.out_features):
        layer.weight.data = new_columns(layer.in_features, layer.out_features).copy_(layer.weight.data.t()).t()
        layer.__class__ = ColumnLinear


class ColumnLinear(nn.Linear):
    """A linear layer whose weight is stored by columns."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        output = _multiply_few(states, self.weight.t(), self.bias)
        return F.linear(states, self.weight, self.bias) if output is None else output


class JoinedLinear(nn.Linear):
    """One of several linear layers that are given the same tensor, its weight a view of the one matrix of them all."""

    matrix: "_Matrix"
    index: int

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        output = self.matrix.output(self.index, states)
        return F.linear(states, self.weight, self.bias) if output is None else output


class _Matrix:
    """Computes all layers of a group when the first of them is asked, and keeps the others' outputs until they are."""

    def __init__(self, columns: torch.Tensor, bias: torch.Tensor | None, widths: Sequence[int]) -> None:
        """`columns: [inputs, outputs]`."""
        self.columns = columns
        self._bias = bias
        self._widths = list(widths)
        self._states: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []
        """Of `_states`, those not yet asked for: each is handed out once, so none outlives a change of its input."""

    def output(self, index: int, states: torch.Tensor) -> torch.Tensor | None:
        """That of a layer; None for many tokens."""
        if states is not self._states or (output := self._outputs[index]) is None:
            joint_output = _multiply_few(states, self.columns, self._bias)
            if joint_output is None:
                return None
            outputs = joint_output.split_with_sizes(self._widths, -1)
            self._states, self._outputs, output = states, list(outputs), outputs[index]
        self._outputs[index] = None
        if (
            index == len(self._widths) - 1
        ):  # the last to ask: as many states as the kernel takes are more than a token's
            self._states = None
        return output


def _multiply_few(states: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Few tokens' states times a matrix `[inputs, outputs]`; None where there are too many to go through it at once,
    or gradients are wanted: a joined matrix would keep the graph of the states it was given last.
    """
    kernel = find_column_kernel()
    if kernel is not None and kernel.is_for(states, columns):
        total = kernel.multiply(states, columns)
    elif states.numel() == columns.shape[0] and not states.requires_grad:
        num_inputs, num_outputs = columns.shape
        num_parts = _num_parts(num_inputs)
        parts = torch.bmm(states.reshape(num_parts, 1, -1), columns.view(num_parts, -1, num_outputs))
        total = parts.sum(0).view(*states.shape[:-1], -1)
    else:
        return None
    if bias is not None:
        total += bias
    return total


@functools.cache
def _num_parts(num_inputs: int) -> int:
    parts = 1
    while num_inputs % (2 * parts) == 0 and num_inputs // (2 * parts) >= MIN_SUMMANDS:
        parts *= 2
    return parts


@dataclass(frozen=True, slots=True)
class _Call:
    """A layer was called."""

    layer: nn.Linear
    states: torch.Tensor
    """Kept, so that no later tensor can be mistaken for it."""
    content: torch.Tensor
    """A copy: a model might change `states` in place between two layers."""


def _can_be_packed(layer: nn.Linear) -> bool:
    """Whether it is a plain layer that MKL multiplies on few threads; elsewhere the gain is not known."""
    is_plain = type(layer) is nn.Linear and not layer._forward_pre_hooks and not layer._forward_hooks
    weight = layer.weight
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    is_known = weight.device.type == "cpu" and weight.dtype == torch.float32 and has_mkl
    return is_plain and is_known and torch.get_num_threads() <= MAX_THREADS and not weight.requires_grad


def _pays(num_inputs: int, num_outputs: int) -> bool:
    """Whether columns make a layer faster: by our kernel always, by MKL where there are few of them to add up."""
    return num_outputs > num_inputs or find_column_kernel() is not None


def _record_calls(layers: Iterable[nn.Linear], run_one_token: Callable[[], object]) -> list[_Call]:
    calls: list[_Call] = []

    def record(layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        if arguments and arguments[0].numel() == layer.in_features:
            calls.append(_Call(layer, arguments[0], arguments[0].clone()))

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        run_one_token()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _groups(calls: Sequence[_Call]) -> list[list[nn.Linear]]:
    """Layers that were called with one unchanged tensor; of those called more than once, none."""
    times_called = Counter(id(call.layer.weight) for call in calls)
    groups: dict[tuple[int, bool], list[_Call]] = {}
    for call in calls:
        if times_called[id(call.layer.weight)] == 1:
            groups.setdefault((id(call.states), call.layer.bias is None), []).append(call)
    return [
        [call.layer for call in group]
        for group in groups.values()
        if all(torch.equal(call.content, group[0].content) for call in group)
    ]


def _join(layers: Sequence[nn.Linear]) -> None:
    num_inputs, widths = layers[0].in_features, [layer.out_features for layer in layers]
    if not _pays(num_inputs, sum(widths)):
        return
    columns = new_columns(num_inputs, sum(widths))
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    matrix = _Matrix(columns, torch.cat(biases) if biases else None, widths)
    for index, (layer, own_columns) in enumerate(zip(layers, torch.split(columns, widths, dim=1), strict=True)):
        layer.weight.data = own_columns.copy_(layer.weight.data.t()).t()
        layer.__class__ = JoinedLinear
        assert isinstance(layer, JoinedLinear)
        layer.matrix, layer.index = matrix, index
