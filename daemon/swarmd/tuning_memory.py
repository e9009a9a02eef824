"""How much memory goes to what clients bring along with calls and sessions: so much each, and so much in all. Pure.

Nothing here knows what a tuning is; `swarmd/tunings.py` does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from p2pswarm.core.byte_sizes import format_byte_size
from p2pswarm.core.errors import BadRequest, ServerBusy

DEFAULT_MAX_BYTES = 64 << 20
"""Of one call or session: rank 16 for all linear layers of ten blocks of a model of 7 billion weights takes 48 MiB."""
NUM_LARGEST = 4
"""How many of the largest there is room for."""


class TuningMemory:
    """Counts what is held. Only for the trio thread."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: of one call or session."""
        self._max_bytes = max_bytes
        self._num_held = 0
        self._used_bytes = 0

    @property
    def total_bytes(self) -> int:
        """What all of them may take."""
        return NUM_LARGEST * self._max_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def num_held(self) -> int:
        """Calls and sessions that have brought something."""
        return self._num_held

    @contextmanager
    def held(self, num_bytes: int) -> Iterator[None]:
        """While it lasts, so many bytes more are held; 0: nothing was brought. Raises `BadRequest`, `ServerBusy`."""
        if num_bytes > self._max_bytes:
            raise BadRequest(
                f"this server takes tunings of up to {format_byte_size(self._max_bytes)} a call or session "
                f"(--max-tuning), got one of {format_byte_size(num_bytes)}"
            )
        if self._used_bytes + num_bytes > self.total_bytes:
            raise ServerBusy(
                f"no room for a tuning of {format_byte_size(num_bytes)}: {self._num_held} others take "
                f"{format_byte_size(self._used_bytes)} of {format_byte_size(self.total_bytes)}"
            )
        count = 1 if num_bytes else 0
        self._num_held += count
        self._used_bytes += num_bytes
        try:
            yield
        finally:
            self._num_held -= count
            self._used_bytes -= num_bytes
