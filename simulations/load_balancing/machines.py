"""The machines that volunteers bring: how many blocks each holds and how fast it is, in several mixtures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from p2pswarm.placement.throughput import server_throughput


@dataclass(frozen=True, slots=True)
class Machine:
    """One server before it has chosen its blocks."""

    num_blocks: int
    throughput_tokens_per_s: float


def machine(num_blocks: int, forward_tokens_per_s: float, network_tokens_per_s: float) -> Machine:
    """A server by the formula that real ones announce by."""
    return Machine(num_blocks, server_throughput(num_blocks, forward_tokens_per_s, network_tokens_per_s))


def _alike(num_model_blocks: int, random: Random) -> Machine:
    return machine(num_model_blocks // 4, 4000.0, 1000.0)


def _two_kinds(num_model_blocks: int, random: Random) -> Machine:
    if random.random() < 0.3:
        return machine(num_model_blocks // 3, 8000.0, 1500.0)
    return machine(num_model_blocks // 10, 1500.0, 1000.0)


def _uneven(num_model_blocks: int, random: Random) -> Machine:
    num_blocks = random.randint(max(1, num_model_blocks // 20), num_model_blocks // 2)
    return machine(num_blocks, 4000 * random.lognormvariate(0, 0.7), 1000 * random.lognormvariate(0, 0.7))


def _few_giants(num_model_blocks: int, random: Random) -> Machine:
    speed = min(random.paretovariate(1.2), 50.0)
    num_blocks = min(num_model_blocks, max(1, round(num_model_blocks / 10 * speed**0.5)))
    return machine(num_blocks, 2000 * speed, 1000.0)


MIXTURES: Mapping[str, Callable[[int, Random], Machine]] = {
    "alike": _alike,
    "two kinds": _two_kinds,
    "uneven": _uneven,
    "few giants": _few_giants,
}
"""By name; each draws a machine for a model of that many blocks."""
