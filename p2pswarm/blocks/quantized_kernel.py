"""The C code of `quantized_kernel.c`, compiled when it is first needed and called with tensors.

bitsandbytes multiplies fast by quantized weights on GPUs and on processors with AVX-512. On one that has AVX2 only it
unpacks all weights for every token: 36 ms for 2048 x 5632 nf4 weights, where float32 takes 2 and this code 0.5. It is
compiled by the machine's own compiler, once, and kept in the user's cache folder. It uses the threads of torch's
OpenMP, which torch has loaded by then.

Where it cannot run, `find_kernel` says why, and bitsandbytes does the work.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch

from p2pswarm.core.quantization import Quantization

SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_FLAGS = ("-O3", "-mavx2", "-mfma", "-fopenmp", "-fPIC")
LINK_FLAGS = ("-shared",)
"""Without OpenMP's library: its functions are found in the one that torch brings."""
COMPILE_TIMEOUT_S = 60.0
"""It takes one second."""
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

    def __init__(self, path: Path) -> None:
        """Raises `OSError` where the library cannot be loaded."""
        library = ctypes.CDLL(str(path))
        self.nf4_values = torch.tensor(list((ctypes.c_float * 16).in_dll(library, "NF4")))
        """What the sixteen codes of nf4 stand for, times the scale."""
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
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        return NoKernel(f"this processor has no AVX2 (torch finds {capability})")
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    flags = " ".join((*COMPILE_FLAGS, *LINK_FLAGS))
    name = hashlib.sha256(flags.encode() + SOURCE.read_bytes()).hexdigest()
    path = Path(platformdirs.user_cache_dir("p2pswarm")) / "kernels" / f"{name}.so"
    try:
        if path.exists():
            return Kernel(path)
        if compiler is None:
            return NoKernel(f"there is no C compiler (looked for {', '.join(COMPILERS)})")
        with tempfile.TemporaryDirectory() as folder:
            built = _compile(compiler, Path(folder))
            _keep(built, path)
            return Kernel(built)
    except subprocess.CalledProcessError as error:
        return NoKernel(f"{compiler} cannot compile {SOURCE.name}: {error.stderr.decode(errors='replace').strip()}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return NoKernel(f"{SOURCE.name} cannot be compiled or loaded: {error}")


def _compile(compiler: str, folder: Path) -> Path:
    compiled, linked = folder / "kernel.o", folder / "kernel.so"
    for command in (
        (compiler, *COMPILE_FLAGS, "-c", SOURCE, "-o", compiled),
        (compiler, *LINK_FLAGS, compiled, "-o", linked),
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)
    return linked


def _keep(built: Path, path: Path) -> None:
    """Keeps it for the next start, if there is a place for it: whole or not at all, also when two servers do so."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built, temporary)
        temporary.replace(path)
