"""Which layers LoRA changes: linear ones inside blocks, matched by their names as peft matches them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from p2pswarm.blocks.adapters import linear_size
from p2pswarm.blocks.architecture import Layout
from p2pswarm.client.tuning import Place
from p2pswarm.core.errors import ConfigError

ALL_LINEAR = "all-linear"
"""peft's word for it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer of a block."""

    place: Place
    inputs: int
    outputs: int
    is_stored_by_inputs: bool
    """As GPT-2 has them; peft wants to be told."""


def resolve(wanted: Sequence[str] | str | None, layout: Layout) -> list[str] | str:
    """Ends of names or a regular expression, also where the choice was left open. Raises `ConfigError`."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    if isinstance(wanted, str):
        return linear_paths(layout) if wanted.lower() == ALL_LINEAR else wanted
    if wanted is not None:
        return list(wanted)
    model_type = layout.model.config.model_type
    usual: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if usual is None:
        raise ConfigError(
            f"peft takes no layers of a {model_type} model by default: name target_modules, of "
            f"{', '.join(linear_paths(layout))}"
        )
    return usual if isinstance(usual, str) else list(usual)


def find_targets(target_modules: Sequence[str] | str, layout: Layout) -> list[Target]:
    """Raises `ConfigError` for names that match nothing, or anything but linear layers of blocks."""
    targets: dict[Place, Target] = {}
    for pattern in [target_modules] if isinstance(target_modules, str) else target_modules:
        for name, module in _matching(pattern, layout, is_end=not isinstance(target_modules, str)):
            target = _as_target(name, module, layout)
            if target is None:
                raise ConfigError(
                    f"target_modules: {pattern!r} matches {name}, a {type(module).__name__}; only linear layers of "
                    f"blocks are tuned: {', '.join(linear_paths(layout))}"
                )
            targets[target.place] = target
    return list(targets.values())


def linear_paths(layout: Layout) -> list[str]:
    """Of all linear layers within blocks."""
    paths = {
        path for block in layout.blocks for path, module in block.named_modules() if linear_size(module) is not None
    }
    return sorted(paths)


def _matching(pattern: str, layout: Layout, *, is_end: bool) -> Iterator[tuple[str, nn.Module]]:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=[pattern] if is_end else pattern)
    try:
        matching = [item for item in layout.model.named_modules() if check_target_module_exists(config, item[0])]
    except re.error as error:
        raise ConfigError(f"target_modules: {pattern!r} is no regular expression: {error}") from error
    if not matching:
        raise ConfigError(
            f"target_modules: no layer of a {layout.model.config.model_type} model is called {pattern!r}; its blocks "
            f"have {', '.join(linear_paths(layout))}"
        )
    yield from matching


def _as_target(name: str, module: nn.Module, layout: Layout) -> Target | None:
    size = linear_size(module)
    block, _, path = name.removeprefix(f"{layout.blocks_path}.").partition(".")
    if size is None or not name.startswith(f"{layout.blocks_path}.") or not block.isdecimal():
        return None
    return Target((int(block), path), *size, is_stored_by_inputs=not isinstance(module, nn.Linear))
