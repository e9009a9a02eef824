"""Transformers without what a server never uses of it: half the time from a program's start to its first token.

Importing any model of transformers imports torch's compiler (and with it a computer algebra system) and its
distributed tensors, for a handful of decorators and type checks. That costs 1.5 s of the 3.9 s which torch and
transformers take (user CPU time, transformers 5.23, torch 2.13). Where scipy is installed, its optimizers take another
0.5 s, for one function of the losses of object detection. Here decorators and function stand in for themselves while
transformers is imported; afterwards everything is as before, and who wants the compiler or that loss gets it.

For programs that own their process (`swarmd`, `swarm`). A program that embeds the library imports transformers as it
likes.
"""

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed

COMPILER = "torch._dynamo"
COMPILER_PART = "torch._dynamo._trace_wrapped_higher_order_op"
"""The one module of the compiler that transformers takes a name from."""

OPTIMIZERS = "scipy.optimize"

Function = TypeVar("Function", bound=Callable[..., Any])


def import_transformers_lightly() -> None:
    """Imports what spans and client models need of transformers; does nothing where that, or the compiler, is there."""
    if COMPILER in sys.modules or "transformers.masking_utils" in sys.modules:
        return
    with _without_compiler(), _without_optimizers(), _without_garbage_collection():
        _import_list_of_models()
        import transformers.modeling_layers  # noqa: F401


def _import_list_of_models() -> None:
    """Imports `transformers.models` with what `transformers` has just read in its thousands of files, which it would
    read again: 0.3 s."""
    folder = Path(str(importlib.import_module("transformers").__file__)).parent / "models"
    files: Any = importlib.import_module("transformers.utils.import_utils")
    read = getattr(files, "create_import_structure_from_path", None)
    if read is None:
        return
    found = read(folder)  # the last thing it was asked, so it still knows
    files.create_import_structure_from_path = lambda path: found if Path(path).parent == folder else read(path)
    try:
        importlib.import_module("transformers.models")
    finally:
        files.create_import_structure_from_path = read


@contextmanager
def _without_compiler() -> Iterator[None]:
    compiler = ModuleType(COMPILER)
    compiler.__path__ = []
    for decorator in ("assume_constant_result", "allow_in_graph", "disable"):
        setattr(compiler, decorator, _unchanged)
    part = ModuleType(COMPILER_PART)
    part.TransformGetItemToIndex = _transform_getitem_to_index  # type: ignore[attr-defined]
    disable, is_available = torch.compiler.disable, torch.distributed.is_available
    stand_ins: Any = torch
    sys.modules |= {COMPILER: compiler, COMPILER_PART: part}
    stand_ins._dynamo = compiler
    stand_ins.compiler.disable = _unchanged_with_options
    stand_ins.distributed.is_available = lambda: False
    try:
        yield
    finally:
        stand_ins.distributed.is_available = is_available
        stand_ins.compiler.disable = disable
        del stand_ins._dynamo, sys.modules[COMPILER], sys.modules[COMPILER_PART]


@contextmanager
def _without_optimizers() -> Iterator[None]:
    if OPTIMIZERS in sys.modules:
        yield
        return
    optimizers = ModuleType(OPTIMIZERS)
    optimizers.linear_sum_assignment = _linear_sum_assignment  # type: ignore[attr-defined]
    sys.modules[OPTIMIZERS] = optimizers
    try:
        yield
    finally:
        del sys.modules[OPTIMIZERS]


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Importing makes many objects and little garbage; looking for it takes a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _unchanged(function: Function) -> Function:
    return function


def _unchanged_with_options(function: Any = None, **options: Any) -> Any:
    return _unchanged if function is None else function


def _transform_getitem_to_index() -> Any:
    """The compiler's own, for the masks that need it."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


def _linear_sum_assignment(*costs: Any, **options: Any) -> Any:
    """The optimizers' own, for the losses that need it."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(*costs, **options)
