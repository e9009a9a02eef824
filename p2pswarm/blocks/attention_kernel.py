"""Attention of one new token in each of several rows, in one call of `attention_kernel.c`.

torch's own function is called once a row and layer, and takes 60 us for 200 tokens of SmolLM2 on one core; the kernel
takes 20, and no Python in between. Where it cannot be compiled, torch's does it.
"""

import ctypes
import functools
from pathlib import Path

import torch

from p2pswarm.blocks.c_library import NoLibrary, load_library

SOURCE = Path(__file__).with_suffix(".c")
LANES = 8
"""Head sizes come in multiples of it."""

POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


class AttentionKernel:
    """All tensors are on the CPU, and contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = library.attend_rows
        sizes = (SIZE,) * 4
        self._attend.argtypes = (
            *(POINTER, *sizes, POINTER, POINTER, SIZE),
            *(POINTER, POINTER, ctypes.c_float, POINTER, ctypes.c_int),
        )

    def is_for(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether it can attend with these queries, `[rows, heads, 1, size]`, to keys and values in a pool."""
        return (
            queries.dtype is keys.dtype is values.dtype is torch.float32
            and keys.device.type == "cpu"
            and keys.shape == values.shape
            and queries.shape[3] == keys.shape[2]
            and queries.shape[3] % LANES == 0
            and queries.shape[1] % keys.shape[0] == 0
            and keys.is_contiguous()
            and values.is_contiguous()
            and not queries.requires_grad
        )

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        runs: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """`[rows, 1, heads, size]` for `queries: [rows, heads, 1, size]`.

        `keys`, `values`: `[key heads, slots, size]`. `runs: [2, rows], int64`: the first slot that each row sees, and
        how many; all within the pool.
        """
        assert self.is_for(queries, keys, values)
        assert runs.is_contiguous()
        num_rows, num_heads, _, size = queries.shape
        queries = queries.contiguous()
        results = torch.empty(num_rows, 1, num_heads, size)
        is_short_of_memory = self._attend(
            queries.data_ptr(),
            num_rows,
            num_heads,
            keys.shape[0],
            size,
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[1],
            runs[0].data_ptr(),
            runs[1].data_ptr(),
            scale,
            results.data_ptr(),
            torch.get_num_threads(),
        )
        if is_short_of_memory:
            raise MemoryError(f"no memory left to attend with {num_rows} rows")
        return results


@functools.cache
def find_attention_kernel() -> AttentionKernel | None:
    """The kernel, compiled if need be. Blocks for a second the first time on a machine."""
    try:
        return AttentionKernel(load_library(SOURCE))
    except NoLibrary:
        return None
