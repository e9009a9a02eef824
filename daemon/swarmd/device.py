"""Which device a server computes on, in which dtype, with how many threads. Facts in, decision out.

The default dtype is the checkpoint's, with two exceptions: float16 becomes float32 on a CPU (few CPUs compute in it,
torch's kernels for it are slow or missing), bfloat16 becomes float16 on MPS (Apple's GPUs lack it). bfloat16 stays
bfloat16 on a CPU: half the memory to read a token, and the bits that the checkpoint has.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from p2pswarm.core.byte_sizes import format_byte_size
from p2pswarm.core.errors import ConfigError
from swarmd.free_memory import available_memory_bytes

DTYPE_OF_NAME = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPE_OF_NAME.items()}
DEVICE_KINDS = ("cuda", "mps", "cpu")

SPARE_SHARES = {"cuda": 0.05, "mps": 0.25, "cpu": 0.2}
"""Of the free memory, not taken for what a server holds: torch's own buffers and fragments; elsewhere also the page
cache and the machine's other work, MPS's with a screen to draw."""
CPU_MODEL_LINE = "model name"


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    dtype: torch.dtype
    warning: str | None = None
    """For the operator, when he did not get what he asked for."""


def find_device(wanted: str = "auto") -> torch.device:
    """The device asked for, or the best one there is: CUDA, then MPS, then the CPU. Raises `ConfigError`."""
    there = [kind for kind in DEVICE_KINDS if _has(kind)]
    if wanted in ("auto", "cuda") and there[0] == "cuda":
        return torch.device("cuda", largest(_cuda_memory_bytes()))
    if wanted == "auto":
        return torch.device(there[0])
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device: wanted auto, cpu, cuda, cuda:N or mps, got {wanted!r}") from error
    if device.type not in there:
        raise ConfigError(f"device: this machine (with this torch) has {', '.join(there)}, got {wanted!r}")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device: this machine has {torch.cuda.device_count()} CUDA devices, got {wanted!r}")
    return device


def note_on_other_devices(wanted: str, device: torch.device) -> str | None:
    """What an operator should know who has several GPUs and did not say which: a server computes on one of them."""
    if wanted not in ("auto", "cuda") or device.type != "cuda":
        return None
    return describe_choice(device.index, _cuda_memory_bytes())


def describe_choice(chosen: int, memory_bytes: Sequence[int]) -> str | None:
    """That this one of several GPUs was chosen, and what to do with the others."""
    if len(memory_bytes) == 1:
        return None
    listed = ", ".join(f"cuda:{index} {format_byte_size(amount)}" for index, amount in enumerate(memory_bytes))
    return f"computing on cuda:{chosen} alone, of {listed}: start a server for each of the others (--device cuda:N)"


def largest(memory_bytes: Sequence[int]) -> int:
    """Which of several devices has most memory; the first of equals."""
    return max(range(len(memory_bytes)), key=lambda index: (memory_bytes[index], -index))


def _cuda_memory_bytes() -> list[int]:
    """Of each GPU, in all: to ask what is free would take some hundred MB on every one of them."""
    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]


def _has(kind: str) -> bool:
    match kind:
        case "cuda":
            return torch.cuda.is_available()
        case "mps":
            return torch.backends.mps.is_available()
    return True


def choose_dtype(
    wanted: str, checkpoint_dtype: torch.dtype, device_kind: str, *, cuda_has_bfloat16: bool = True
) -> DtypeChoice:
    """The dtype to compute in. Raises `ConfigError` for what was asked for by name and cannot work."""
    dtype = checkpoint_dtype if wanted == "auto" else DTYPE_OF_NAME[wanted]
    if dtype not in NAME_OF_DTYPE:
        stored_as = str(dtype).removeprefix("torch.")
        return DtypeChoice(torch.float32, f"the checkpoint is stored as {stored_as}: computing in float32")
    match device_kind, dtype:
        case "cpu", torch.float16 if wanted == "auto":
            return DtypeChoice(torch.float32)
        case "cpu", torch.float16:
            raise ConfigError("dtype: float16 does not work on a CPU: use --dtype float32 or --dtype bfloat16")
        case "mps", torch.bfloat16:
            return DtypeChoice(torch.float16, "bfloat16 does not work on MPS: computing in float16")
        case "cuda", torch.bfloat16 if not cuda_has_bfloat16:
            if wanted == "auto":
                return DtypeChoice(torch.float16, "this GPU has no bfloat16: computing in float16")
            raise ConfigError("dtype: this GPU has no bfloat16: use --dtype float16 or --dtype float32")
    return DtypeChoice(dtype)


def free_memory_bytes(device: torch.device) -> int:
    """What the device could still hold; on MPS and CPU, what the machine could."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return available_memory_bytes()


def spare_share(device_kind: str) -> float:
    """Which part of the free memory a server leaves alone."""
    return SPARE_SHARES.get(device_kind, SPARE_SHARES["cpu"])


def device_name(device: torch.device) -> str:
    """The make of the device, for people and as part of what a measurement holds for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {_cpu_model()}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith(CPU_MODEL_LINE))
    return next(models, platform.processor() or platform.machine())


def set_threads(threads: int | None) -> None:
    """Called on the thread that computes: torch works with so many threads.

    The default is one per physical core: two that share a core's arithmetic units only wait for each other.
    """
    torch.set_num_threads(threads or psutil.cpu_count(logical=False) or 1)
