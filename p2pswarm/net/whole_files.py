"""Small files, written whole or not at all. Secret ones are open to their user only, and refused where they are not."""

import os
import secrets
import stat
from pathlib import Path

from p2pswarm.core.errors import ConfigError

MAX_SECRET_BYTES = 4096
"""The longest kind of key file has 300."""


def read_secret_file(path: Path, kind: str) -> bytes:
    """What is in it. Raises `ConfigError`, which calls it a `kind` file, where it is missing or open to others."""
    try:
        readable_by_others = stat.S_IMODE(path.stat().st_mode) & 0o077
        with path.open("rb") as file:
            data = file.read(MAX_SECRET_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read the {kind} file {path}: {error.strerror}") from error
    if readable_by_others and os.name == "posix":
        raise ConfigError(f"the {kind} file {path} is open to other users: run `chmod 600 {path}`")
    return data


def create_secret_file(path: Path, data: bytes, kind: str) -> None:
    """Writes a new file. Raises `FileExistsError` where there is one already, `ConfigError` where it cannot be made."""
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        finally:
            temporary.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot create the {kind} file {path}: {error.strerror}") from error


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file that may be there already. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")
