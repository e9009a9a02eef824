"""Measures what a span takes on this machine, in a fraction of a second, on the very span that is served.

It runs what the server will run: prepared decode steps, batches of them, and a longer prompt.
"""

import statistics
import time
from collections.abc import Callable

import torch

from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.blocks.pages import PAGE_TOKENS
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.blocks.span_steps import BatchedStep
from swarmd.throughput import MEASURED_ROWS, ComputeSpeed, Measurement

MEASURED_DECODE_S = 0.07
"""For each kind of decode step; at least one runs, however long it takes."""
MAX_DECODE_STEPS = 9
MEASURED_PREFILL_S = 0.15
MAX_PREFILL_TOKENS = 64
PREFILL_ADVANTAGE = 8
"""A token of a long prompt costs at most this share of a decode step, whose time goes into reading the weights."""
UNDISTURBED = 0.9
"""Which part of the time a thread that computes has a processor for itself, where nothing else wants it."""


def measure_compute(
    model: SpanModel,
    clock_s: Callable[[], float] = time.perf_counter,
    cpu_clock_s: Callable[[], float] = time.thread_time,
) -> Measurement:
    """Decodes a few tokens, alone and together, and runs one longer prompt. On the thread that owns the device."""
    _run(model, model.new_cache(1), position=0, num_tokens=1)  # reads the weights, allocates memory
    started_s, cpu_started_s = clock_s(), cpu_clock_s()
    decode_s = _decode_s(model, clock_s)
    speed = ComputeSpeed(decode_s, _batched_decode_s(model, clock_s), _prefill_token_s(model, decode_s, clock_s))
    took_s, cpu_s = clock_s() - started_s, cpu_clock_s() - cpu_started_s
    return Measurement(speed, was_disturbed=model.device.type == "cpu" and cpu_s < UNDISTURBED * took_s)


def _decode_s(model: SpanModel, clock_s: Callable[[], float]) -> float:
    cache = model.new_cache(1)
    position = 0

    def step() -> float:
        nonlocal position
        prepared = model.prepare(cache)  # while the client thinks
        started_s = clock_s()
        states = torch.zeros(1, 1, model.hidden_size)
        model.run(states, cache, position=position, prepared=prepared).cpu()
        position += 1
        return clock_s() - started_s

    return _median_s(step)


def _batched_decode_s(model: SpanModel, clock_s: Callable[[], float]) -> float:
    pool = model.new_pool(MEASURED_ROWS)
    caches = [model.new_cache(1, max_length=PAGE_TOKENS, pool=pool) for _ in range(MEASURED_ROWS)]
    states = torch.zeros(1, 1, model.hidden_size)
    position = 0

    def step() -> float:
        nonlocal position
        started_s = clock_s()
        if model.can_batch:
            answers = model.run_batch([BatchedStep(cache, states, position) for cache in caches])
        else:
            answers = [model.run(states, cache, position=position) for cache in caches]
        for answer in answers:
            answer.cpu()
        position += 1
        return clock_s() - started_s

    step()
    return _median_s(step)


def _prefill_token_s(model: SpanModel, decode_s: float, clock_s: Callable[[], float]) -> float:
    num_tokens = max(1, min(int(MEASURED_PREFILL_S / decode_s * PREFILL_ADVANTAGE), MAX_PREFILL_TOKENS))
    cache = model.new_cache(1)
    started_s = clock_s()
    _run(model, cache, position=0, num_tokens=num_tokens)
    return (clock_s() - started_s) / num_tokens


def _median_s(step: Callable[[], float]) -> float:
    """Of as many steps as there is time for: other work on the machine slows some of them."""
    steps_s = [step()]
    while sum(steps_s) < MEASURED_DECODE_S and len(steps_s) < MAX_DECODE_STEPS:
        steps_s.append(step())
    return statistics.median(steps_s)


def _run(model: SpanModel, cache: SpanCache, *, position: int, num_tokens: int) -> None:
    hidden_states = torch.zeros(1, num_tokens, model.hidden_size)
    model.run(hidden_states, cache, position=position).cpu()  # waits for the device
