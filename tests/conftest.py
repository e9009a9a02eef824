"""`--with-swarm-key`: the swarms of server processes that tests share are private ones."""

from pathlib import Path

import pytest

from p2pswarm.net.identity import Identity
from p2pswarm.net.private.swarm_key import SwarmKey


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--with-swarm-key", action="store_true", help="give servers and clients of real swarms a swarm key"
    )


@pytest.fixture(scope="session")
def swarm_key_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The file of the key that swarms of this run have; None: they are open to all."""
    if not request.config.getoption("--with-swarm-key"):
        return None
    path = tmp_path_factory.mktemp("private") / "swarm.key"
    SwarmKey.generate(Identity.generate()).save(path)
    return path
