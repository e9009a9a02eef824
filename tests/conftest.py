"""What holds for all tests: their order and processes, how they are interrupted, whether shared swarms are private."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2pswarm.net.identity import Identity
from p2pswarm.net.private.swarm_key import SwarmKey

IN_OWN_PROCESS = "P2PSWARM_TEST_IN_OWN_PROCESS"
"""Is set where a test has a process for itself."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or commands that tests interrupt would go on


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--with-swarm-key", action="store_true", help="give servers and clients of real swarms a swarm key"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: of several processes none is left alone with a long one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test that wants a process of its own in a fresh one.

    What one process has resident, all tests that ran in it before have a part in: memory that they freed and the heap
    kept is used again, or given back, while another test measures.
    """
    if pyfuncitem.get_closest_marker("own_process") is None or IN_OWN_PROCESS in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", pyfuncitem.nodeid]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=pyfuncitem.config.rootpath,
        env={**variables, IN_OWN_PROCESS: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    return True


@pytest.fixture(scope="session")
def swarm_key_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The file of the key that swarms of this run have; None: they are open to all."""
    if not request.config.getoption("--with-swarm-key"):
        return None
    path = tmp_path_factory.mktemp("private") / "swarm.key"
    SwarmKey.generate(Identity.generate()).save(path)
    return path
