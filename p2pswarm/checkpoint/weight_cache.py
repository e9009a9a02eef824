"""Weights on this machine's disk, shared by all processes that need them, within a limit.

Each file is one part of a model, usually a block, and appears under its name only when it is whole. Who reads one holds
a shared lock on it, who writes or removes one an exclusive lock (`flock`, which the system drops however a process
ends), so nothing goes while anyone needs it, and what two processes need is made once. Of what nobody holds, the least
recently used goes first. Deciding is done in `disk_room.py`; what the files hold is not known here.

    <folder>/<key>                         a whole file; its time of change is that of its last use
    <folder>/<key>.<final size>.partial    on its way, or left by a process that died: the next one goes on from there
    <folder>/.lock                         held while files are looked through, claimed, renamed or removed
"""

import errno
import fcntl
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from p2pswarm.checkpoint.cache_directory import CACHE_VARIABLE
from p2pswarm.checkpoint.disk_room import MIN_FREE_BYTES, CachedFile, DiskState, least_recently_used_first
from p2pswarm.checkpoint.progress import Progress, ProgressListener, Work
from p2pswarm.core.byte_sizes import format_byte_size
from p2pswarm.core.errors import ConfigError

WHOLE_SUFFIX = ".safetensors"
PARTIAL = re.compile(r"\.(?P<size>\d+)\.partial$")

Fill = Callable[[BinaryIO], None]
"""Writes a file to its end. It is given where an earlier attempt stopped: at its position, which may be 0."""


class WeightCache:
    """The files under one folder. What was found or added is held until `release`, or as long as this object lives."""

    def __init__(
        self,
        folder: Path,
        max_bytes: int | None = None,
        *,
        listener: ProgressListener = lambda progress: None,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._listener = listener
        self._free_bytes = free_bytes
        self._held: dict[str, BinaryIO] = {}
        weakref.finalize(self, _close_all, self._held)

    def find(self, key: str) -> Path | None:
        """The file, held from now on; None where it is not there."""
        path = self.folder / key
        if key in self._held and not _is_at(self._held[key], path):  # somebody has emptied the folder
            self._held.pop(key).close()
        while key not in self._held:
            try:
                file = path.open("rb")
                fcntl.flock(file, fcntl.LOCK_SH)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise self._cannot_use(error) from error
            if not _is_at(file, path):  # removed in between
                file.close()
                continue
            self._held[key] = file
        with suppress(PermissionError):  # of another user, who keeps the cache for both
            os.utime(path)
        return path

    def add(self, key: str, size_bytes: int, fill: Fill) -> Path:
        """The file, held from now on, made by `fill` unless it is there by then. It will have about `size_bytes`.

        Waits while another process makes it. Raises `ConfigError` where there is no room for it, and what `fill`
        raises; what `fill` wrote until then is kept for the next attempt.
        """
        partial = self.folder / f"{key}.{size_bytes}.partial"
        while True:
            with self._alone():
                if (path := self.find(key)) is not None:
                    return path
                file = self._claim(partial)
                if file is not None:
                    with _closed_on_error(file):
                        self._make_room(partial, size_bytes)
            if file is None:
                self._listener(Progress(Work.WAITING, key, 0, size_bytes))
                _wait_until_unlocked(partial)
                continue
            with _closed_on_error(file):
                self._fill(file, fill, size_bytes)
                with self._alone():
                    os.replace(partial, self.folder / key)
                    fcntl.flock(file, fcntl.LOCK_SH)
                    self._held[key] = file

    def remove(self, key: str) -> None:
        """Removes a file that turned out to be damaged."""
        with self._alone():
            (self.folder / key).unlink(missing_ok=True)
            if file := self._held.pop(key, None):
                file.close()

    def release(self) -> None:
        """Lets other processes remove what was held here. Mapped files stay readable even then."""
        _close_all(self._held)

    def require_room(self, sizes: Mapping[str, int]) -> None:
        """Raises `ConfigError` where these files, needed together, can never be here together."""
        wanted = [(self.folder / key, size) for key, size in sizes.items()]
        if self._state().lacking_bytes(wanted):
            raise self._no_room(sum(sizes.values()))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else looks through this cache meanwhile, or changes which files there are."""
        self._make_folder()
        try:
            lock = (self.folder / ".lock").open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise self._cannot_use(error) from error
        with lock:
            yield

    def _claim(self, partial: Path) -> BinaryIO | None:
        """The file, made if need be, for this process alone; None while another one is at it."""
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        except OSError as error:
            raise self._cannot_use(error) from error
        if _lock_alone(file):
            return file
        file.close()
        return None

    def _fill(self, file: BinaryIO, fill: Fill, size_bytes: int) -> None:
        file.seek(0, os.SEEK_END)
        try:
            fill(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave a whole name on half a file
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._no_room(size_bytes) from error

    def _make_room(self, partial: Path, size_bytes: int) -> None:
        """Removes what nobody holds until the limits hold; nothing if that is not enough."""
        state = self._state()
        excess_bytes = state.excess_bytes()
        with ExitStack() as locks:
            removable = []
            for cached in least_recently_used_first(state.files):
                if excess_bytes <= 0:
                    break
                if cached.path == partial:
                    continue
                if _lock_alone(locks.enter_context(cached.path.open("rb"))):
                    removable.append(cached.path)
                    excess_bytes -= cached.claimed_bytes
            if excess_bytes > 0:
                if not partial.stat().st_size:
                    partial.unlink()  # with its claim
                raise self._no_room(size_bytes)
            for path in removable:
                path.unlink(missing_ok=True)

    def _state(self) -> DiskState:
        self._make_folder()
        files = [_cached_file(path) for path in self.folder.rglob("*") if _is_weights(path)]
        return DiskState(
            files=[file for file in files if file is not None],
            free_bytes=self._free_bytes(self.folder),
            max_bytes=self._max_bytes,
        )

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_use(error) from error

    def _no_room(self, wanted_bytes: int) -> ConfigError:
        state = self._state()
        limit = "no limit" if state.max_bytes is None else f"a limit of {format_byte_size(state.max_bytes)}"
        return ConfigError(
            f"no room for {format_byte_size(wanted_bytes)} of weights in {self.folder}: it has {limit}, "
            f"{format_byte_size(state.claimed_bytes)} are there, part of them perhaps in use, and the disk has "
            f"{format_byte_size(state.free_bytes)} free, of which {format_byte_size(MIN_FREE_BYTES)} stay free; "
            f"serve fewer blocks, raise --max-disk-space, free some of the disk, or move the cache (--cache-dir or "
            f"{CACHE_VARIABLE})"
        )

    def _cannot_use(self, error: OSError) -> ConfigError:
        hint = f"set {CACHE_VARIABLE} or --cache-dir to a folder that can be written to"
        return ConfigError(f"cannot use the cache {self.folder}: {error.strerror}; {hint}")


def _close_all(files: dict[str, BinaryIO]) -> None:
    while files:
        files.popitem()[1].close()


def _is_weights(path: Path) -> bool:
    return path.suffix == WHOLE_SUFFIX or PARTIAL.search(path.name) is not None


def _cached_file(path: Path) -> CachedFile | None:
    """None where it is gone by now: a writer may have failed."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    match = PARTIAL.search(path.name)
    claimed_bytes = max(status.st_size, int(match["size"])) if match else status.st_size
    return CachedFile(path, status.st_size, claimed_bytes, status.st_mtime)


def _lock_alone(file: BinaryIO) -> bool:
    """Whether nobody else holds the file, which then nobody else can."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_until_unlocked(path: Path) -> None:
    with suppress(FileNotFoundError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _closed_on_error(file: BinaryIO) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.close()
        raise
