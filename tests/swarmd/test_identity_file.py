"""No two running nodes share an identity, and a lone one keeps its own."""

from pathlib import Path

import platformdirs
import pytest

from p2pswarm.core.errors import ConfigError
from p2pswarm.net.identity import Identity
from swarmd.identity_file import held_identity, known_peers_path


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_data_path", lambda _: tmp_path)
    return tmp_path / "identities"


def test_nodes_of_one_user_take_one_default_identity_each(data_folder: Path) -> None:
    with held_identity(None, "server") as first:
        with held_identity(None, "server") as second:
            assert (first, second) == (data_folder / "server-0.key", data_folder / "server-1.key")
        with held_identity(None, "bootstrap") as other:
            assert other == data_folder / "bootstrap-0.key"
    with held_identity(None, "server") as again:
        assert again == first


def test_an_identity_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    with held_identity(path, "server"), pytest.raises(ConfigError, match=r"another node is running with .*node\.key"):
        held_identity(path, "server").__enter__()
    with held_identity(path, "server"):
        pass


def test_the_identity_stays_the_same_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    with held_identity(path, "server"):
        first = Identity.load_or_create(path).peer_id
    with held_identity(path, "server"):
        assert Identity.load_or_create(path).peer_id == first


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(b"not a key")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is not an identity file"):
        held_identity(path, "server").__enter__()


def test_known_peers_lie_beside_the_key() -> None:
    assert known_peers_path(Path("/x/server-0.key")) == Path("/x/server-0.peers.json")
