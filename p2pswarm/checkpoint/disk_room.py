"""How much of the weight cache must go so that its limits hold: pure arithmetic over a list of its files.

A file that is being written claims its final size from the start, so that several downloads at once cannot promise
themselves the same room.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MIN_FREE_BYTES = 1 << 30
"""1 GiB of the disk stays free: what else runs on the machine needs some."""


@dataclass(frozen=True, slots=True)
class CachedFile:
    """One file of weights, whole or on its way."""

    path: Path
    size_bytes: int
    """What it takes on the disk now."""
    claimed_bytes: int
    """What it will take when it is whole."""
    last_used_s: float
    """Unix time."""


@dataclass(frozen=True, slots=True)
class DiskState:
    """The cache's files, and what the disk has left beside them."""

    files: Sequence[CachedFile]
    free_bytes: int
    max_bytes: int | None
    """What the files may claim together; None: whatever the disk has."""

    @property
    def claimed_bytes(self) -> int:
        return sum(file.claimed_bytes for file in self.files)

    @property
    def unclaimed_bytes(self) -> int:
        """What is free on the disk once all files are whole, beyond what stays free."""
        outstanding_bytes = sum(file.claimed_bytes - file.size_bytes for file in self.files)
        return self.free_bytes - outstanding_bytes - MIN_FREE_BYTES

    def excess_bytes(self) -> int:
        """How much must go."""
        over_limit = 0 if self.max_bytes is None else self.claimed_bytes - self.max_bytes
        return max(0, over_limit, -self.unclaimed_bytes)

    def lacking_bytes(self, wanted: Iterable[tuple[Path, int]]) -> int:
        """What `wanted`, files with their sizes that are needed together, would exceed the limits by, even if all
        other files went.
        """
        sizes = dict(wanted)
        present = [file for file in self.files if file.path in sizes]
        missing_bytes = sum(sizes.values()) - sum(file.claimed_bytes for file in present)
        removable_bytes = self.claimed_bytes - sum(file.claimed_bytes for file in present)
        over_limit = 0 if self.max_bytes is None else sum(sizes.values()) - self.max_bytes
        return max(0, over_limit, missing_bytes - removable_bytes - self.unclaimed_bytes)


def least_recently_used_first(files: Iterable[CachedFile]) -> list[CachedFile]:
    return sorted(files, key=lambda file: (file.last_used_s, file.path))
