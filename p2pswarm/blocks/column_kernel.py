"""A few rows of states times a layer that is stored by columns (`packed_weights.py`), by `column_kernel.c`.

MKL copies the matrix into another order before it multiplies by more than three rows. Measured on one core of an AMD
EPYC (AVX2), through 150 MB of layers of SmolLM2-135M in float32, in ms:

| rows | 1 | 2 | 4 | 8 | 16 |
| --- | --- | --- | --- | --- | --- |
| 576 x 3072, MKL | 4.7 | 8.4 | 13.0 | 15.6 | 20.5 |
| 576 x 3072, this | 4.8 | 5.9 | 7.6 | 11.7 | 19.5 |
| 576 x 49152 (the head), MKL | 4.2 | 8.8 | 25.4 | 27.6 | 33.5 |
| 576 x 49152, this | 4.7 | 5.3 | 7.2 | 11.2 | 19.3 |

Where it cannot be compiled, all goes on as without it.
"""

import ctypes
import functools
from pathlib import Path

import torch

from p2pswarm.blocks.c_library import NoLibrary, load_library

SOURCE = Path(__file__).with_suffix(".c")
MIN_ROWS, MAX_ROWS = 2, 16
"""For which it is faster than MKL."""
DEPTH = 8
"""Inputs come in multiples of it."""

POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


class ColumnKernel:
    """Multiplies by matrices stored by columns. All tensors are float32, on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._multiply = library.multiply_columns
        self._multiply.argtypes = (POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, ctypes.c_int)

    def is_for(self, states: torch.Tensor, columns: torch.Tensor) -> bool:
        """Whether it can multiply them, faster than MKL."""
        num_inputs = columns.shape[0]
        return (
            MIN_ROWS * num_inputs <= states.numel() <= MAX_ROWS * num_inputs
            and num_inputs % DEPTH == 0
            and states.dtype is columns.dtype is torch.float32
            and columns.device.type == "cpu"
            and columns.is_contiguous()
            and not (states.requires_grad or columns.requires_grad)
        )

    def multiply(self, states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """`[rows, outputs]`: `states: [rows, inputs]` times `columns: [inputs, outputs]`, which must be contiguous."""
        assert states.shape[1] == columns.shape[0]
        assert self.is_for(states, columns)
        states = states.contiguous()
        rows, inputs = states.shape
        outputs = columns.shape[1]
        results = torch.empty(rows, outputs)
        self._multiply(
            states.data_ptr(),
            rows,
            inputs,
            outputs,
            columns.data_ptr(),
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
