"""How fast this server is: measured at every start, in a fraction of a second, on the very span it serves."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.blocks.span_model import SpanModel

MEASURED_DECODE_S = 0.07
MAX_DECODE_STEPS = 5
"""Or fewer, when they take longer than that together: a server has to be ready within seconds."""
MEASURED_FORWARD_S = 0.15
MAX_FORWARD_TOKENS = 64
FORWARD_ADVANTAGE = 8
"""A token of a long prompt costs at most this share of a decode step, whose time goes into reading the weights."""
NETWORK_BITS_PER_S = 100e6
"""Assumed, not measured: an ordinary line. Only the smaller of compute and network is compared between servers."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """In the units of `ServerInfo`."""

    inference_tokens_per_s: float
    forward_tokens_per_s: float
    network_tokens_per_s: float

    def of_server(self, num_blocks: int) -> float:
        """Tokens per second of the server as a whole, for requests that use (K + 1) / 2 of its K blocks on average."""
        return min(self.forward_tokens_per_s / ((num_blocks + 1) / 2), self.network_tokens_per_s)


def measure_throughput(model: SpanModel, clock_s: Callable[[], float] = time.perf_counter) -> Throughput:
    """Decodes a few tokens and runs one longer prompt. On the thread that owns the device."""
    decode_s = _decode_step_s(model, clock_s)
    num_tokens = max(1, min(int(MEASURED_FORWARD_S / decode_s * FORWARD_ADVANTAGE), MAX_FORWARD_TOKENS))
    started_s = clock_s()
    _run(model, None, position=0, num_tokens=num_tokens)
    forward_s = clock_s() - started_s
    num_blocks = model.span.num_blocks
    return Throughput(
        inference_tokens_per_s=num_blocks / decode_s,
        forward_tokens_per_s=num_blocks * num_tokens / forward_s,
        network_tokens_per_s=NETWORK_BITS_PER_S / (8 * model.dtype.itemsize * model.hidden_size),
    )


def _decode_step_s(model: SpanModel, clock_s: Callable[[], float]) -> float:
    cache = model.new_cache(1)
    _run(model, cache, position=0, num_tokens=1)  # reads the weights from disk, makes the first allocations
    started_s = clock_s()
    for step in range(1, MAX_DECODE_STEPS + 1):
        _run(model, cache, position=step, num_tokens=1)
        elapsed_s = clock_s() - started_s
        if elapsed_s > MEASURED_DECODE_S:
            break
    return elapsed_s / step


def _run(model: SpanModel, cache: SpanCache | None, *, position: int, num_tokens: int) -> None:
    hidden_states = torch.zeros(1, num_tokens, model.hidden_size)
    model.run(hidden_states, cache, position=position).cpu()  # waits for the device
