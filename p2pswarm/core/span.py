"""A span: the contiguous, half-open range of transformer blocks that one server holds or one hop runs."""

from dataclasses import dataclass

from p2pswarm.core.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks `start` up to but not including `end`; never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ConfigError(f"a span is START:END with 0 <= START < END, got {self.start}:{self.end}")

    @classmethod
    def parse(cls, text: str) -> "Span":
        """The span written as `START:END`, as on a command line."""
        start, colon, end = text.partition(":")
        if not (colon and start.strip().isdecimal() and end.strip().isdecimal()):
            raise ConfigError(f"a span is written START:END with two whole numbers (0:10, say), got {text!r}")
        return cls(int(start), int(end))

    @property
    def num_blocks(self) -> int:
        return self.end - self.start

    def contains(self, other: "Span") -> bool:
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: "Span") -> bool:
        return self.start < other.end and other.start < self.end

    def covers(self, block_index: int) -> bool:
        return self.start <= block_index < self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


def uncovered(spans: list[Span], within: Span) -> list[Span]:
    """The parts of `within` that no span covers, in order."""
    gaps = []
    reached = within.start
    for span in sorted(spans):
        if span.start > reached:
            gaps.append(Span(reached, min(span.start, within.end)))
        reached = max(reached, span.end)
        if reached >= within.end:
            return gaps
    gaps.append(Span(reached, within.end))
    return gaps
