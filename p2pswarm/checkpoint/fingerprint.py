"""What a model is, in 16 hex digits: a digest over its config and the sha256 of each of its weight files.

The hub states the sha256 of large files, so that a server that downloads one shard of a hub model and a server with
the whole folder on its disk come to the same fingerprint. Hashes of local files are computed once and remembered by
path, size, time of change and inode.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2pswarm.checkpoint.cache_directory import cache_directory, write_atomically
from p2pswarm.checkpoint.progress import Progress, ProgressListener, Work

FINGERPRINT_HEX_DIGITS = 16
HASH_CHUNK_BYTES = 1 << 22
"""4 MiB: large enough that Python's share of hashing is nothing."""
CONFIG_KEYS_WITHOUT_MEANING = frozenset({"_name_or_path", "transformers_version"})
"""They change when a folder is copied or saved again, while the model stays the same."""


def fingerprint(config: Mapping[str, Any] | None, weight_hashes: Mapping[str, str]) -> str:
    """The digest over a raw `config.json` (None: the weight file holds it) and the sha256 of each weight file by
    name.
    """
    meaning = {key: value for key, value in (config or {}).items() if key not in CONFIG_KEYS_WITHOUT_MEANING}
    digest = hashlib.sha256()
    digest.update(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(weight_hashes):
        digest.update(f"\n{name} {weight_hashes[name]}".encode())
    return digest.hexdigest()[:FINGERPRINT_HEX_DIGITS]


def file_sha256(path: Path, listener: ProgressListener | None = None) -> str:
    """The sha256 of a file in hex, remembered until the file changes."""
    real = path.resolve()
    status = real.stat()
    identity = f"{real}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    memory = cache_directory() / "hashes" / hashlib.sha256(identity.encode()).hexdigest()
    if memory.exists():
        return memory.read_text()
    digest = hashlib.sha256()
    done_bytes = 0
    with real.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            done_bytes += len(chunk)
            if listener is not None:
                listener(Progress(Work.HASHING, path.name, done_bytes, status.st_size))
    text = digest.hexdigest()
    write_atomically(memory, lambda temporary: temporary.write_text(text))
    return text
