"""The limit on open files rises to what a node needs, and never falls."""

import subprocess
import sys

import pytest

from p2pswarm.net.config import NetworkConfig
from swarmd.open_files import ENOUGH_FILES

PROGRAM = """
import resource, sys
from swarmd.open_files import allow_enough_files
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
allow_enough_files()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize(
    ("before", "after"),
    [((256, 8192), (4096, 8192)), ((256, 1024), (1024, 1024)), ((5000, 8192), (5000, 8192))],
    ids=["too few", "no more allowed", "more than enough"],
)
def test_the_limit_rises_to_what_is_needed(before: tuple[int, int], after: tuple[int, int]) -> None:
    command = [sys.executable, "-c", PROGRAM, *map(str, before)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert tuple(map(int, said.split())) == after


def test_enough_is_more_than_all_connections() -> None:
    assert NetworkConfig().max_connections + NetworkConfig().max_entrants <= ENOUGH_FILES / 2
