"""How fast a server says it is: what it was measured to compute, and what its line can carry. Pure.

`swarmd/compute_speed.py` measures the one, `swarmd/line_speed.py` the other.
"""

from dataclasses import dataclass, replace
from enum import Enum

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.placement.throughput import server_throughput

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
class SpanSpeed:
    """All that a span's announced speeds follow from, but for the line."""

    compute: ComputeSpeed
    num_blocks: int
    token_bytes: int
    """Of a token's hidden states, on the line."""
    stated_tokens_per_s: float | None = None
    """What the operator wants announced for the server as a whole."""

    @property
    def forward_tokens_per_s(self) -> float:
        return self.num_blocks / self.compute.prefill_token_s

    def network_tokens_per_s(self, line_bits_per_s: float) -> float:
        return line_bits_per_s / (8 * self.token_bytes)

    def server_tokens_per_s(self, line_bits_per_s: float, *, using_relay: bool) -> float:
        """What is announced for the server as a whole."""
        if self.stated_tokens_per_s is not None:
            return self.stated_tokens_per_s
        network_tokens_per_s = self.network_tokens_per_s(line_bits_per_s)
        return server_throughput(
            self.num_blocks, self.forward_tokens_per_s, network_tokens_per_s, using_relay=using_relay
        )

    def announced(self, info: ServerInfo, line_bits_per_s: float) -> ServerInfo:
        """The announcement with these speeds over such a line."""
        return replace(
            info,
            throughput_tokens_per_s=self.server_tokens_per_s(line_bits_per_s, using_relay=info.using_relay),
            inference_tokens_per_s=self.num_blocks / self.compute.decode_s,
            forward_tokens_per_s=self.forward_tokens_per_s,
            network_tokens_per_s=self.network_tokens_per_s(line_bits_per_s),
        )
