"""Which server holds which blocks, on paper: the moves that would serve the swarm's worst blocks better.

Servers are lists of numbers here. Throughputs are whole numbers, so that sums are exact, the same on all machines and
in whatever order; that is what makes comparisons of arrangements a true order, and the search end.

An arrangement is better than another if its worst block is served better; where those are equal, if its second worst
is, and so on (leximin). Moves that go from each arrangement to a better one never lower the minimum, cannot go in
circles, and still make progress where there are several worst blocks far apart, which no single move can all help.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from p2pswarm.core.span import Span
from p2pswarm.placement.windows import worst_window

MAX_ROUNDS = 8
"""Over all servers. A few are enough; a bound on what a check may cost."""

Whole = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the servers should be, and what the swarm has of it."""

    spans: tuple[Span, ...]
    minimum_now: int
    minimum: int
    """When all are there."""


@lru_cache(maxsize=8)  # a swarm that has not changed since the last check is not planned for again
def plan(
    num_model_blocks: int,
    spans: tuple[Span, ...],
    throughputs: tuple[int, ...],
    movable: tuple[int, ...],
    contentment: float,
) -> Plan:
    """The servers as they are, but for those moves that together raise the minimum.

    Nothing is planned where the minimum is at least `contentment` times what it could be at most. Else the search takes
    up to a second for a thousand servers that are placed badly, on models of a hundred blocks.
    """
    arrangement = Arrangement(num_model_blocks, spans, throughputs)
    minimum_now = arrangement.minimum
    if minimum_now >= contentment * arrangement.upper_bound:
        return Plan(spans, minimum_now, minimum_now)
    arrangement.improve(movable)
    if arrangement.minimum == 0:
        arrangement.place_anew(movable)
    arrangement.move_back_the_needless(spans)
    return Plan(tuple(arrangement.spans), minimum_now, arrangement.minimum)


class Arrangement:
    """Spans that can be changed, and the blocks' throughputs that follow."""

    def __init__(self, num_model_blocks: int, spans: Sequence[Span], throughputs: Sequence[int]) -> None:
        self.spans = list(spans)
        self._throughputs = throughputs
        changes = np.zeros(num_model_blocks + 1, np.int64)
        np.add.at(changes, [span.start for span in spans], throughputs)
        np.subtract.at(changes, [span.end for span in spans], throughputs)
        self._blocks: Whole = np.cumsum(changes[:-1])

    @property
    def minimum(self) -> int:
        """The throughput of the worst-served block."""
        return int(self._blocks.min())

    @property
    def upper_bound(self) -> float:
        """What the minimum cannot exceed, however the servers are arranged: the average over the blocks."""
        return float(self._blocks.mean())

    def move(self, index: int, span: Span) -> None:
        """Lets the server of that index hold other blocks."""
        self._blocks = self._after_move(index, span)
        self.spans[index] = span

    def is_better_after(self, index: int, span: Span) -> bool:
        """Whether the arrangement with that server there is better than this one."""
        before, after = np.sort(self._blocks), np.sort(self._after_move(index, span))
        differing = np.flatnonzero(before != after)
        return len(differing) > 0 and bool(after[differing[0]] > before[differing[0]])

    def improve(self, movable: Sequence[int]) -> None:
        """Moves one of the `movable` servers after the other as long as that makes it better."""
        for _ in range(MAX_ROUNDS):
            has_moved = False
            for index in self._least_needed_first(movable):
                span = self._worst_served(index)
                if span != self.spans[index] and self.is_better_after(index, span):
                    self.move(index, span)
                    has_moved = True
            if not has_moved:
                return

    def place_anew(self, movable: Sequence[int]) -> None:
        """Takes all the `movable` servers away and lets them join one after the other, the largest first.

        Where blocks are not served at all, there is no minimum that moves could lower; and starting from nothing,
        everybody arrives at the same arrangement, whoever has moved already.
        """
        for index in movable:
            self._blocks = self._without(index)
        for index in sorted(movable, key=lambda index: -self.spans[index].num_blocks):
            num_blocks = self.spans[index].num_blocks
            start = worst_window(self._blocks, num_blocks)
            self.spans[index] = Span(start, start + num_blocks)
            self._blocks[start : start + num_blocks] += self._throughputs[index]
        self.improve(movable)

    def move_back_the_needless(self, before: Sequence[Span]) -> None:
        """Lets servers go back to where they were `before` as long as that does not lower the minimum."""
        wanted = self.minimum
        for index, span in enumerate(before):
            if span != self.spans[index] and self._after_move(index, span).min() >= wanted:
                self.move(index, span)

    def _after_move(self, index: int, span: Span) -> Whole:
        blocks = self._without(index)
        blocks[span.start : span.end] += self._throughputs[index]
        return blocks

    def _without(self, index: int) -> Whole:
        blocks = self._blocks.copy()
        blocks[self.spans[index].start : self.spans[index].end] -= self._throughputs[index]
        return blocks

    def _worst_served(self, index: int) -> Span:
        """The blocks that the server would take if it came now."""
        num_blocks = self.spans[index].num_blocks
        start = worst_window(self._without(index), num_blocks)
        return Span(start, start + num_blocks)

    def _least_needed_first(self, movable: Sequence[int]) -> list[int]:
        """Those first whose worst-served block is served best, who cost least when they leave; else in order."""
        return sorted(movable, key=lambda index: -self._blocks[self.spans[index].start : self.spans[index].end].min())
