"""How fast a server says it is: what it was measured to compute, and what its line can carry. Pure.

`swarmd/compute_speed.py` measures the one, `swarmd/line_speed.py` the other.
"""

from dataclasses import dataclass
from enum import Enum

from p2pswarm.core.errors import ConfigError

ASSUMED_LINE_BITS_PER_S = 100e6
"""An ordinary line. Only the smaller of compute and network is compared between servers."""
MEASURED_ROWS = 8
"""Sessions decoded together when a server measures itself."""


class ThroughputSource(Enum):
    """Where the figures of `--throughput` come from."""

    AUTO = "auto"
    """What was measured on this machine before, else a measurement."""
    EVAL = "eval"
    """A new measurement."""
    DRY_RUN = "dry-run"
    """A new measurement, shown to the operator; nothing is served."""


ThroughputSetting = ThroughputSource | float
"""A number, in tokens per second, is announced for the server as a whole instead of what is measured."""


def parse_throughput(text: str) -> ThroughputSetting:
    """`auto`, `eval`, `dry-run` or a number. Raises `ConfigError`."""
    for source in ThroughputSource:
        if text == source.value:
            return source
    try:
        tokens_per_s = float(text)
    except ValueError:
        tokens_per_s = 0.0
    if not 0 < tokens_per_s < float("inf"):
        raise ConfigError(f"throughput: wanted auto, eval, dry-run or tokens per second, got {text!r}")
    return tokens_per_s


@dataclass(frozen=True, slots=True)
class ComputeSpeed:
    """What a span takes on this machine, in seconds."""

    decode_s: float
    """One token of one session."""
    batched_decode_s: float
    """One token of each of `MEASURED_ROWS` sessions at once."""
    prefill_token_s: float
    """One token of a long prompt."""


@dataclass(frozen=True, slots=True)
class Measurement:
    speed: ComputeSpeed
    was_disturbed: bool
    """Other programs had the processor for part of the time: the figure is today's, and not for keeping."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """In the units of `ServerInfo`."""

    inference_tokens_per_s: float
    forward_tokens_per_s: float
    network_tokens_per_s: float


def throughput_of(speed: ComputeSpeed, num_blocks: int, token_bytes: int, line_bits_per_s: float) -> Throughput:
    """The figures of a span of `num_blocks` blocks, where a token's hidden state takes `token_bytes` on the line."""
    return Throughput(
        inference_tokens_per_s=num_blocks / speed.decode_s,
        forward_tokens_per_s=num_blocks / speed.prefill_token_s,
        network_tokens_per_s=line_bits_per_s / (8 * token_bytes),
    )
