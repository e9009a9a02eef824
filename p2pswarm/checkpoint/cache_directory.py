"""Where converted weights and computed hashes are kept between runs; files appear there whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from p2pswarm.core.errors import ConfigError

CACHE_VARIABLE = "P2PSWARM_CACHE"
"""Environment variable that moves the cache elsewhere."""


def cache_directory() -> Path:
    """The folder for everything that can be made again; it need not exist yet."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("p2pswarm"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a temporary file beside `path`, then moves it there in one step.

    Several processes may do this for the same path at once: each reader sees one whole file, the last writer's.
    Raises `ConfigError` where the folder cannot be written to.
    """
    hint = f"set {CACHE_VARIABLE} to a folder that can be written to"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ConfigError(f"cannot write to the cache {path.parent}: {error.strerror}; {hint}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"the disk of the cache {path.parent} is full: free some of it, or {hint}") from error
    finally:
        temporary.unlink(missing_ok=True)
