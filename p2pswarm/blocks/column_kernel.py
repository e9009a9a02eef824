"""A few rows of states times a layer that is stored by columns (`packed_weights.py`), by `column_kernel.c`.

MKL copies the matrix into another order before it multiplies by more than three rows. Measured on one core of an AMD
EPYC (AVX2), through 150 MB of layers of SmolLM2-135M in float32 and once through its head, in ms of processor time, the
best of eleven, on a machine that others used too:

| rows | 1 | 2 | 4 | 8 | 16 | 32 |
| --- | --- | --- | --- | --- | --- | --- |
| 576 x 3072, MKL, by rows | 10.3 | 18.0 | 19.8 | 22.5 | 30.7 | 45.4 |
| 576 x 3072, MKL, by columns | 6.9 | 11.5 | 16.3 | 19.2 | 25.2 | 38.2 |
| 576 x 3072, this | 6.3 | 7.8 | 9.0 | 10.5 | 17.4 | 33.7 |
| 1536 x 576, MKL, by rows | 8.3 | 13.7 | 15.8 | 19.0 | 25.7 | 38.5 |
| 1536 x 576, MKL, by columns | 10.5 | 15.4 | 14.6 | 17.5 | 24.1 | 36.8 |
| 1536 x 576, this | 8.2 | 8.3 | 8.7 | 10.0 | 16.2 | 30.6 |
| 576 x 49152 (the head), MKL, by columns | 4.6 | 9.0 | 13.4 | 16.2 | 22.7 | 31.5 |
| 576 x 49152, this | 4.3 | 6.0 | 6.7 | 8.1 | 13.2 | 25.8 |

Reading 150 MB takes 6 to 8 ms, and 16 rows are 2.4 billion multiplications, for which the core needs 13 ms at least.
Where it cannot be compiled, all goes on as without it.
"""

import ctypes
import functools
from pathlib import Path

import torch

from p2pswarm.blocks.c_library import NoLibrary, load_library

SOURCE = Path(__file__).with_suffix(".c")
MAX_ROWS = 32
"""For up to so many it is faster than MKL."""
LINE = 16
"""How many numbers a line of the processor's cache holds."""

POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


class ColumnKernel:
    """Multiplies by matrices stored by columns. All tensors are float32, on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._multiply = library.multiply_columns
        self._multiply.argtypes = (POINTER, SIZE, SIZE, SIZE, POINTER, SIZE, POINTER, ctypes.c_int)

    def is_for(self, states: torch.Tensor, columns: torch.Tensor) -> bool:
        """Whether it can multiply `states: [..., inputs]` by `columns: [inputs, outputs]`, faster than MKL."""
        return (
            0 < states.numel() <= MAX_ROWS * columns.shape[0]
            and states.dtype is columns.dtype is torch.float32
            and columns.is_cpu
            and columns.stride(1) == 1
            and not (states.requires_grad or columns.requires_grad)
        )

    def multiply(self, states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """`[..., outputs]`: `states: [..., inputs]` times `columns: [inputs, outputs]`, which it must be for."""
        *leading_shape, num_inputs = states.shape
        inputs, outputs = columns.shape
        assert num_inputs == inputs
        states = states.contiguous()
        results = torch.empty(*leading_shape, outputs, dtype=torch.float32)
        self._multiply(
            states.data_ptr(),
            states.numel() // inputs,
            inputs,
            outputs,
            columns.data_ptr(),
            columns.stride(0),
            results.data_ptr(),
            torch.get_num_threads(),
        )
        return results


@functools.cache
def find_column_kernel() -> ColumnKernel | None:
    """The kernel, compiled if need be. Blocks for a second the first time on a machine."""
    try:
        return ColumnKernel(load_library(SOURCE))
    except NoLibrary:
        return None


def new_columns(inputs: int, outputs: int) -> torch.Tensor:
    """Room for `[inputs, outputs]` in float32, its rows an odd number of cache lines apart.

    Of rows that are, say, 64 lines apart the caches can hold but eight at a time, whatever else they are free to hold:
    which place a line may take is told by the last digits of its number.
    """
    lines = -(-outputs // LINE) | 1
    return torch.empty(inputs, lines * LINE, dtype=torch.float32)[:, :outputs]
