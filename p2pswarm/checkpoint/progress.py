"""What of a model's weights is being read, fetched or converted, for whoever waits for it."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Work(StrEnum):
    HASHING = "hashing"
    DOWNLOADING = "downloading"
    CONVERTING = "converting"
    WAITING = "waiting"
    """For another process, which downloads or converts the same part."""


@dataclass(frozen=True, slots=True)
class Progress:
    work: Work
    what: str
    done_bytes: int
    total_bytes: int


ProgressListener = Callable[[Progress], None]
"""Called in the thread that does the work, up to some hundred times a second."""
