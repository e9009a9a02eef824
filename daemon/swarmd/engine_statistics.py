"""What the blocks that are served now have to do: the device's work, its KV cache, what clients brought. Plain data.

`swarmd/statistics.py` puts it together with what the rest of the server says.
"""

from dataclasses import dataclass

from swarmd.memory import KVMemory
from swarmd.scheduling.dispatcher import Dispatcher, DispatcherStatistics
from swarmd.tuning_memory import TuningMemory


@dataclass(frozen=True, slots=True)
class MemoryStatistics:
    """Of the KV cache."""

    total_tokens: int
    tokens_left: int
    """Not promised to anybody."""
    num_queued: int
    """Sessions that wait to get in."""
    num_evicted: int
    """Since the blocks were loaded."""

    @property
    def tokens_used(self) -> int:
        return self.total_tokens - self.tokens_left


@dataclass(frozen=True, slots=True)
class TuningStatistics:
    """Of what clients brought along."""

    num_held: int
    """By calls and sessions that go on."""
    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Of the blocks that are served; sums are since they were loaded."""

    dispatcher: DispatcherStatistics
    memory: MemoryStatistics
    tunings: TuningStatistics

    @property
    def mean_batch_rows(self) -> float:
        """Rows decoded together, on average; 0 before the first."""
        sizes = self.dispatcher.batch_sizes
        num_batches = sum(sizes.values())
        return sum(rows * times for rows, times in sizes.items()) / num_batches if num_batches else 0.0


def engine_statistics(dispatcher: Dispatcher, memory: KVMemory, tunings: TuningMemory) -> EngineStatistics:
    """As they are now."""
    return EngineStatistics(
        dispatcher.statistics(),
        MemoryStatistics(memory.total_tokens, memory.tokens_left, memory.num_queued, memory.num_evicted),
        TuningStatistics(tunings.num_held, tunings.used_bytes, tunings.total_bytes),
    )
