"""What is to be trained beside a frozen model, as `from_pretrained` is told. Checked once, here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from p2pswarm.core.errors import ConfigError

TuningMode = Literal["ptune", "deep_ptune", "lora"]


@dataclass(frozen=True, slots=True)
class TuningOptions:
    """Raises `ConfigError` where an option cannot work for any model."""

    tuning_mode: TuningMode
    pre_seq_len: int = 16
    """Virtual tokens in front of each text; for `ptune` and `deep_ptune`."""
    lora_rank: int = 8
    lora_alpha: int = 16
    """What LoRA adds is multiplied by `lora_alpha / lora_rank`."""
    target_modules: Sequence[str] | str | None = None
    """Layers that LoRA changes, matched as peft does: ends of names, one regular expression for whole names, or
    `"all-linear"`. None: those that peft takes for the architecture."""
    seed: int = 0
    """For where training begins."""

    def __post_init__(self) -> None:
        if self.tuning_mode not in get_args(TuningMode):
            raise ConfigError(f"tuning_mode is {', '.join(get_args(TuningMode))} or None, got {self.tuning_mode!r}")
        for name in ("pre_seq_len", "lora_rank", "lora_alpha"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is a whole number, 1 or more, got {value!r}")
        if self.target_modules is not None and not self.target_modules:
            raise ConfigError("target_modules names at least one layer, or is None for those that peft would take")
