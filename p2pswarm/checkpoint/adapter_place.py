"""Where an operator says that an adapter is, and what clients call it. Pure text; `adapter_files.py` opens it."""

import re
from dataclasses import dataclass
from pathlib import Path

from p2pswarm.core.errors import ConfigError

MAX_NAME_LETTERS = 100
"""With `@` and the fingerprint it must go into an announcement (`wire/server_info.py`)."""
NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_NAME_LETTERS}}}")


@dataclass(frozen=True, slots=True)
class AdapterPlace:
    """A folder or a hub id, and a name."""

    path: str
    name: str

    @classmethod
    def parse(cls, text: str) -> "AdapterPlace":
        """From `PATH=NAME`, or `PATH`, whose last part is the name then. Raises `ConfigError`."""
        path, separator, name = text.rpartition("=")
        if not separator:
            path, name = text, Path(text).name
        if not path or not NAME.fullmatch(name):
            raise ConfigError(
                f"adapters: wanted PATH or PATH=NAME, the name in up to {MAX_NAME_LETTERS} letters, digits and ._-, "
                f"got {text!r}"
            )
        return cls(path, name)
