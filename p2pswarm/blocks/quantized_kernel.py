"""The C code of `quantized_kernel.c`, compiled when it is first needed and called with tensors.

bitsandbytes multiplies fast by quantized weights on GPUs and on processors with AVX-512. On one that has AVX2 only it
unpacks all weights for every token: 36 ms for 2048 x 5632 nf4 weights, where float32 takes 2 and this code 0.5.

Where it cannot be compiled or run (`c_library.py`), `find_kernel` says why, and bitsandbytes does the work.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from p2pswarm.blocks.c_library import NoLibrary, load_library
from p2pswarm.core.quantization import Quantization

SOURCE = Path(__file__).with_suffix(".c")
STATES_PRECISION = 2.0**-15
"""Of the largest state of a block of 64, to which the kernel rounds."""
BLOCK_WEIGHTS = 64
"""How many weights of a row share a scale in nf4; rows come in multiples of it."""
CONVERTED_WEIGHTS = 1 << 18
"""At once, of a layer that is quantized. Large copies would leave malloc's heap full of holes: 300 MiB of them, in a
process with 100 MiB of int8 weights."""

POINTER, SIZE, THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@dataclass(frozen=True, slots=True)
class NoKernel:
    """The kernel cannot be used here."""

    reason: str


class Kernel:
    """Quantizes the weights of linear layers, and multiplies by them. All tensors are on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        nf4_values = torch.tensor(list((ctypes.c_float * 16).in_dll(library, "NF4")))
        self.nf4_pairs = torch.cartesian_prod(nf4_values, nf4_values)
        """[256, 2]: what the two codes of nf4 in each byte stand for, times the scale."""
        self._quantize_nf4 = library.nf4_quantize
        self._quantize_nf4.argtypes = (POINTER, SIZE, POINTER, POINTER, THREADS)
        self._quantize_int8 = library.int8_quantize
        self._quantize_int8.argtypes = (POINTER, SIZE, SIZE, POINTER, POINTER, THREADS)
        self._multiply = {Quantization.NF4: library.nf4_multiply, Quantization.INT8: library.int8_multiply}
        for function in self._multiply.values():
            function.argtypes = (POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, POINTER, POINTER, THREADS)

    def quantize(self, weight: torch.Tensor, quantization: Quantization) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight and its scales as bitsandbytes would have them.

        `weight: [outputs, inputs], any float`, inputs a multiple of `BLOCK_WEIGHTS`. int8: `[outputs, inputs], int8`
        and `[outputs], float32`; nf4: `[outputs, inputs / 2], uint8` and `[outputs, inputs / 64], float32`.
        """
        outputs, inputs = weight.shape
        assert inputs % BLOCK_WEIGHTS == 0
        if quantization is Quantization.INT8:
            quantized, scales = torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs)
        else:
            assert quantization is Quantization.NF4
            quantized = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
            scales = torch.empty(outputs, inputs // BLOCK_WEIGHTS)
        num_rows = max(1, CONVERTED_WEIGHTS // inputs)
        parts = zip(*(torch.split(tensor, num_rows) for tensor in (weight, quantized, scales)), strict=True)
        for weight_part, quantized_part, scales_part in parts:
            self._quantize_rows(weight_part, quantized_part, scales_part, quantization)
        return quantized, scales

    def _quantize_rows(
        self, weight: torch.Tensor, quantized: torch.Tensor, scales: torch.Tensor, quantization: Quantization
    ) -> None:
        threads = torch.get_num_threads()
        if quantization is Quantization.INT8:
            source = weight.to(torch.float16).to(torch.float32).contiguous()  # bitsandbytes starts from float16
            outputs, inputs = weight.shape
            self._quantize_int8(source.data_ptr(), inputs, outputs, quantized.data_ptr(), scales.data_ptr(), threads)
        else:
            source = weight.to(torch.float32).contiguous()
            self._quantize_nf4(source.data_ptr(), scales.numel(), quantized.data_ptr(), scales.data_ptr(), threads)

    def multiply(
        self,
        states: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        quantization: Quantization,
    ) -> torch.Tensor:
        """`[..., outputs], float32`: each row of `states: [..., inputs], float32, contiguous` times the weight."""
        *leading, inputs = states.shape
        outputs = weight.shape[0]
        if inputs * outputs != weight.numel() * (2 if quantization is Quantization.NF4 else 1):
            raise ValueError(f"states of {inputs} numbers do not fit a layer of {list(weight.shape)} {weight.dtype}")
        results = torch.empty(*leading, outputs)
        rows = states.numel() // inputs
        is_short_of_memory = self._multiply[quantization](
            states.data_ptr(),
            rows,
            inputs,
            outputs,
            weight.data_ptr(),
            scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            results.data_ptr(),
            torch.get_num_threads(),
        )
        if is_short_of_memory:
            raise MemoryError(f"no memory left to round {rows} rows of {inputs} numbers")
        return results


@functools.cache
def find_kernel() -> Kernel | NoKernel:
    """The kernel, compiled if need be. Blocks for a second the first time on a machine."""
    try:
        return Kernel(load_library(SOURCE))
    except NoLibrary as error:
        return NoKernel(str(error))
