"""Which key file a node uses, and that no two running nodes use the same one.

Two nodes of one identity would take each other's streams and overwrite each other's announcements. So the file is
locked for as long as the process lives; the system drops the lock however the process ends.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from p2pswarm.core.errors import ConfigError
from p2pswarm.net.identity import Identity
from p2pswarm.net.private.private_swarm import PrivateSwarm

MAX_NODES_PER_USER = 1000
"""Of one kind, running at once on one machine with default identities."""


@contextmanager
def held_identity(path: Path | None, kind: str) -> Iterator[Path]:
    """The identity file, which is there, sound, and nobody else's until the context ends.

    With a `path`, that one; without, the first of the user's own (`server-0.key`, `server-1.key`, ... for `kind`
    "server") that is not in use, so that a machine's only server keeps its peer id over restarts. Raises
    `ConfigError`.
    """
    candidates = [path] if path is not None else default_paths(kind)
    for candidate in candidates:
        Identity.load_or_create(candidate)
        with candidate.open("rb") as file:
            if _lock(file.fileno()):
                yield candidate
                return
    if path is not None:
        raise ConfigError(
            f"another node is running with the identity {path}: stop it, or give this one a file of its own"
        )
    raise ConfigError(
        f"all {MAX_NODES_PER_USER} identities in {candidates[0].parent} are in use: give one with --identity"
    )


def default_paths(kind: str) -> list[Path]:
    """Where a user's nodes keep their keys."""
    folder = platformdirs.user_data_path("p2pswarm") / "identities"
    return [folder / f"{kind}-{index}.key" for index in range(MAX_NODES_PER_USER)]


def known_peers_path(identity_path: Path, private: PrivateSwarm | None = None) -> Path:
    """Where the node of this identity remembers other nodes, apart for each private swarm."""
    swarm = "" if private is None else f".{private.key.swarm_id}"
    return identity_path.with_suffix(f"{swarm}.peers.json")


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
