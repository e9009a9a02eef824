"""What machines were measured to do, kept on disk: a server that starts again need not measure again.

Servers on one machine share the file. A lock is held while one of them measures, so that two that start at the same
moment do not slow each other down, and the second finds what the first has written.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from p2pswarm.checkpoint.cache_directory import cache_directory, write_atomically
from swarmd.throughput import ComputeSpeed, Measurement

FILE_NAME = "compute-speeds.json"
LOCK_TIMEOUT_S = 5.0
"""Longer than others measure; who waits longer measures all the same."""
MAX_ENTRIES = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MeasuredOn:
    """All that a speed depends on; another value of any of these calls for another measurement."""

    model_id: str
    num_blocks: int
    device: str
    """Its make, as in "AMD EPYC" or "NVIDIA H100"."""
    dtype: str
    quantization: str
    threads: int
    versions: str
    """Of what computes."""

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


class SpeedCache:
    """Compute speeds in one JSON file; a damaged one counts as empty."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or cache_directory() / FILE_NAME

    def measured_before(self, on: MeasuredOn, measure: Callable[[], Measurement]) -> ComputeSpeed:
        """What is kept, else what `measure` gives, which is kept from then on if nothing disturbed it."""
        kept = _speed(self._read().get(on.key))
        if kept is not None:
            return kept
        with self._locked():
            kept = _speed(self._read().get(on.key))  # by somebody else meanwhile
            return kept or self._keep(on, measure())

    def measured_anew(self, on: MeasuredOn, measure: Callable[[], Measurement]) -> ComputeSpeed:
        """What `measure` gives, kept instead of what was if nothing disturbed it."""
        with self._locked():
            return self._keep(on, measure())

    def _keep(self, on: MeasuredOn, measurement: Measurement) -> ComputeSpeed:
        speed = measurement.speed
        if measurement.was_disturbed:
            return speed
        entries = self._read()
        entries.pop(on.key, None)
        entries[on.key] = asdict(speed)
        newest = dict(list(entries.items())[-MAX_ENTRIES:])
        write_atomically(self._path, lambda temporary: temporary.write_text(json.dumps(newest, indent=1)))
        return speed

    def _read(self) -> dict[str, object]:
        try:
            entries = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("measuring anew, because %s cannot be read: %s", self._path, error)
            return {}
        return entries if isinstance(entries, dict) else {}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self._path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S)
        try:
            lock.acquire()
        except OSError as error:  # `Timeout` is one
            logger.info("measuring without knowing whether others do: %s", error)
        try:
            yield
        finally:
            lock.release()


def _speed(entry: object) -> ComputeSpeed | None:
    """The speed in the file, if there is one and it makes sense."""
    names = ComputeSpeed.__dataclass_fields__
    if not isinstance(entry, dict) or entry.keys() != names.keys():
        return None
    if not all(isinstance(seconds, float) and 0 < seconds < float("inf") for seconds in entry.values()):
        return None
    return ComputeSpeed(**entry)
