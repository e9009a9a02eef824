"""How many files and sockets this process may have open: as many as the limits on connections allow."""

import sys

if sys.platform != "win32":  # which has no such limit on sockets
    import resource

ENOUGH_FILES = 4096
"""All connections that a node may have, those at the door, the checkpoint's files, and plenty besides."""


def allow_enough_files() -> None:
    """Raises the process's limit to that, where it is lower and the system lets it; many systems begin with 1,024."""
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(ENOUGH_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
