"""What holds for all tests: which run first, how they are interrupted, and whether shared swarms are private ones."""

import signal
from pathlib import Path

import pytest

from p2pswarm.net.identity import Identity
from p2pswarm.net.private.swarm_key import SwarmKey

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or commands that tests interrupt would go on


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--with-swarm-key", action="store_true", help="give servers and clients of real swarms a swarm key"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: of several processes none is left alone with a long one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def swarm_key_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The file of the key that swarms of this run have; None: they are open to all."""
    if not request.config.getoption("--with-swarm-key"):
        return None
    path = tmp_path_factory.mktemp("private") / "swarm.key"
    SwarmKey.generate(Identity.generate()).save(path)
    return path
