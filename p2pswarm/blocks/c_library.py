"""C code of ours, compiled when it is first needed: for what torch's kernels do slowly on processors without AVX-512.

It is compiled by the machine's own compiler, once, and kept in the user's cache folder. It uses the threads of torch's
OpenMP, which torch has loaded by then. Who asks for it does without where it cannot be had: that costs speed only.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import platformdirs
import torch

COMPILERS = ("cc", "gcc", "clang")
COMPILE_FLAGS = ("-O3", "-mavx2", "-mfma", "-fopenmp", "-fPIC")
LINK_FLAGS = ("-shared",)
"""Without OpenMP's library: its functions are found in the one that torch brings."""
COMPILE_TIMEOUT_S = 60.0
"""It takes one second."""


class NoLibrary(Exception):
    """The code cannot be used here; the message says why."""


def load_library(source: Path) -> ctypes.CDLL:
    """The functions of a C file, compiled if need be. Blocks for a second the first time on a machine.

    Raises `NoLibrary`.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        raise NoLibrary(f"this processor has no AVX2 (torch finds {capability})")
    flags = " ".join((*COMPILE_FLAGS, *LINK_FLAGS))
    name = hashlib.sha256(flags.encode() + source.read_bytes()).hexdigest()
    path = Path(platformdirs.user_cache_dir("p2pswarm")) / "kernels" / f"{name}.so"
    try:
        return ctypes.CDLL(str(path)) if path.exists() else _built(source, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibrary(f"{source.name} cannot be compiled or loaded: {error}") from error


def _built(source: Path, path: Path) -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NoLibrary(f"there is no C compiler (looked for {', '.join(COMPILERS)})")
    with tempfile.TemporaryDirectory() as folder:
        try:
            built = _compile(compiler, source, Path(folder))
        except subprocess.CalledProcessError as error:
            complaint = error.stderr.decode(errors="replace").strip()
            raise NoLibrary(f"{compiler} cannot compile {source.name}: {complaint}") from error
        _keep(built, path)
        return ctypes.CDLL(str(built))


def _compile(compiler: str, source: Path, folder: Path) -> Path:
    compiled, linked = folder / "kernel.o", folder / "kernel.so"
    for command in (
        (compiler, *COMPILE_FLAGS, "-c", source, "-o", compiled),
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
