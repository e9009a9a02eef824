"""A container's memory limit counts where it is tighter than the machine's."""

from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from swarmd.free_memory import available_memory_bytes

MIB = 1 << 20


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_2(folder: str, limit: str, used_bytes: int, page_cache_bytes: int = 0) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/{folder}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{folder}/memory.current": f"{used_bytes}\n",
        f"sys/fs/cgroup/{folder}/memory.stat": f"anon 4096\ninactive_file {page_cache_bytes}\n",
    }


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_containers_limit_counts_less_what_it_uses_but_page_cache(tmp_path: Path) -> None:
    root = write(
        tmp_path, {"proc/self/cgroup": "0::/\n"} | version_2(".", str(64 * MIB), 30 * MIB, page_cache_bytes=10 * MIB)
    )
    assert available_memory_bytes(root) == 44 * MIB


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {"proc/self/cgroup": "0::/user.slice/app.scope\n"}
        | version_2("user.slice", str(50 * MIB), 20 * MIB)
        | version_2("user.slice/app.scope", "max", 10 * MIB),
    )
    assert available_memory_bytes(root) == 30 * MIB


def test_version_1_is_read_also_where_the_group_has_another_name_outside(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpuset:/docker/abc\n3:memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{40 * MIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{30 * MIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {5 * MIB}\n",
        },
    )
    assert available_memory_bytes(root) == 15 * MIB


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/../elsewhere\n"} | version_2(".", str(MIB), 2 * MIB))
    assert available_memory_bytes(root) == 0


def test_no_limit_leaves_it_to_the_machine(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/a\nnonsense\n"} | version_2("a", "max", 2 * MIB))
    assert available_memory_bytes(root) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
