"""The kernel is compiled once, and where it cannot be, the reason is told."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from p2pswarm.blocks import c_library
from p2pswarm.blocks.quantized_kernel import Kernel, NoKernel, find_kernel


@pytest.fixture(autouse=True)
def _found_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if isinstance(found := find_kernel(), NoKernel):
        pytest.skip(found.reason)
    monkeypatch.setattr(c_library.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    find_kernel.cache_clear()
    yield
    find_kernel.cache_clear()


def refusal() -> str:
    found = find_kernel()
    assert isinstance(found, NoKernel)
    return found.reason


def test_it_is_compiled_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(find_kernel(), Kernel)
    (kept,) = (tmp_path / "p2pswarm" / "kernels").iterdir()
    assert kept.suffix == ".so"
    find_kernel.cache_clear()
    monkeypatch.setattr(c_library.shutil, "which", lambda name: None)
    assert isinstance(find_kernel(), Kernel)


def test_a_cache_that_cannot_be_written_to_costs_a_second_each_time(tmp_path: Path) -> None:
    (tmp_path / "p2pswarm").write_text("in the way")
    assert isinstance(find_kernel(), Kernel)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_library.shutil, "which", lambda name: None)
    assert refusal() == "there is no C compiler (looked for cc, gcc, clang)"


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'unknown flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(c_library.shutil, "which", lambda name: str(compiler))
    assert refusal() == f"{compiler} cannot compile quantized_kernel.c: unknown flag"


def test_a_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    assert isinstance(find_kernel(), Kernel)
    (kept,) = (tmp_path / "p2pswarm" / "kernels").iterdir()
    kept.unlink()  # not written over: it is loaded
    kept.write_bytes(b"not a library")
    find_kernel.cache_clear()
    assert "cannot be compiled or loaded" in refusal()


def test_a_processor_without_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert refusal() == "this processor has no AVX2 (torch finds DEFAULT)"
