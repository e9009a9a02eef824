"""Imports torch and transformers in half the time, by putting off what a server hardly ever uses.

CPU seconds on a 2.4 GHz core, until ten blocks of a small model are loaded (torch 2.13, transformers 5.23): 6.3 as
is; 5.4 without a garbage collector that goes through all modules again and again; 2.4 without torch's compiler,
symbolic shapes and sharded tensors as well. Transformers and torch import those for the sake of decorators and checks
that mean nothing to code that is not compiled; stand-ins answer for them meanwhile, and give way to the real ones
when more is asked.
"""

import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

NEEDED = (
    "transformers.modeling_layers",
    "transformers.masking_utils",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
)
"""What every model needs of transformers, whatever its type."""
Function = TypeVar("Function", bound=Callable[..., Any])


@contextmanager
def quick_start() -> Iterator[None]:
    """For a process's start: nothing is collected meanwhile, and what is alive at its end is never looked at again."""
    gc.disable()
    try:
        yield
    finally:
        _remove_stand_ins()
        gc.freeze()
        gc.enable()


def import_transformers() -> None:
    """Imports what every model needs; within `quick_start`."""
    torch: Any = importlib.import_module("torch")
    for name, attributes in STAND_INS.items():
        if name not in sys.modules:
            sys.modules[name] = StandIn(name, attributes)
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False  # transformers asks once, and remembers
    try:
        _import_list_of_models()
        for name in NEEDED:
            importlib.import_module(name)
    finally:
        torch.distributed.is_available = is_available


def _import_list_of_models() -> None:
    """Imports `transformers.models` with what `transformers` found in its thousands of files: once is enough."""
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


class StandIn(ModuleType):
    """In the place of a module of which little is used; asked for anything else, it becomes the real one."""

    def __init__(self, name: str, attributes: Mapping[str, object]) -> None:
        super().__init__(name)
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _remove_stand_ins()
        return getattr(importlib.import_module(self.__name__), name)


def _remove_stand_ins() -> None:
    for name in STAND_INS:
        if isinstance(sys.modules.get(name), StandIn):
            del sys.modules[name]


def _unchanged(function: Function) -> Function:
    return function


def _disable(function: Function | None = None, *_: object, **__: object) -> Function | Callable[[Function], Function]:
    return _unchanged if function is None else function


def _no(_: object) -> bool:
    return False


def _indexing_mode() -> Any:
    """The real thing, when a mask is made that needs it."""
    _remove_stand_ins()
    return importlib.import_module(INDEXING).TransformGetItemToIndex()


INDEXING = "torch._dynamo._trace_wrapped_higher_order_op"
STAND_INS: Mapping[str, Mapping[str, object]] = {
    "torch._dynamo": {"assume_constant_result": _unchanged, "allow_in_graph": _unchanged, "disable": _disable},
    INDEXING: {"TransformGetItemToIndex": _indexing_mode},
    "torch.fx.experimental.symbolic_shapes": {
        "expect_true": bool,
        "guard_or_false": bool,
        "guard_or_true": bool,
        "is_nested_int": _no,
    },
}
"""What is put off, and what of it is answered without it."""
