"""How much memory a process may still take: what the machine has left or, where less, what its control groups allow.

Containers and systemd limit memory by control groups (cgroups). A process that goes beyond is killed, although the
machine has memory left. Limits hold for groups within groups, so the tightest of all that hold the process counts.
Both versions of the Linux interface are read; where there is neither, only the machine counts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil


@dataclass(frozen=True, slots=True)
class _Interface:
    """How a version of cgroups calls things."""

    mount: str
    limit: str
    usage: str
    page_cache: str
    """The line of `memory.stat` with the file pages that the kernel drops when memory gets short."""


_VERSION_1 = _Interface("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Interface("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available_memory_bytes(root: Path = Path("/")) -> int:
    """What this process could still take without harm. `root` is where `proc` and `sys` are."""
    return min([psutil.virtual_memory().available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """For each control group around this process that has a limit, what is left of it."""
    for interface, group in _groups(_read(root / "proc/self/cgroup").splitlines()):
        # A container sees its own group at the mount's top, under a name that only the machine outside knows.
        for folder in (group, *group.parents):
            left = _left_in_group(root / interface.mount / folder, interface)
            if left is not None:
                yield left


def _groups(lines: Iterable[str]) -> Iterator[tuple[_Interface, PurePosixPath]]:
    """The process's groups that count memory, from lines `number:controllers:path`."""
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:  # a group outside of what this process sees
            group = PurePosixPath()
        if number == "0" and not controllers:
            yield _VERSION_2, group
        elif "memory" in controllers.split(","):
            yield _VERSION_1, group


def _left_in_group(folder: Path, interface: _Interface) -> int | None:
    limit, usage = _read(folder / interface.limit).strip(), _read(folder / interface.usage).strip()
    if not limit.isdecimal() or not usage.isdecimal():  # `max`, or no such group here
        return None
    counts = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    return max(0, int(limit) - int(usage) + int(counts.get(interface.page_cache, "0")))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not Linux, or not this version of the interface
        return ""
