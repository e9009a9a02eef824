import os
import stat
from pathlib import Path

import pytest

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.identity import Identity
from p2pswarm.net.private.swarm_key import SwarmKey

OWNER = Identity.generate(bytes(32))
KEY = SwarmKey(bytes(range(32)), OWNER.peer_id)


def test_key_survives_its_file(tmp_path: Path) -> None:
    key = SwarmKey.generate(OWNER)
    key.save(tmp_path / "swarm.key")
    assert SwarmKey.load(tmp_path / "swarm.key") == key


def test_key_file_is_open_to_its_user_only(tmp_path: Path) -> None:
    KEY.save(tmp_path / "swarm.key")
    assert stat.S_IMODE((tmp_path / "swarm.key").stat().st_mode) == 0o600


@pytest.mark.skipif(os.name != "posix", reason="modes of files mean something on POSIX only")
def test_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    KEY.save(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=f"open to other users: run `chmod 600 {path}`"):
        SwarmKey.load(path)


def test_key_is_never_written_over_another_one(tmp_path: Path) -> None:
    KEY.save(tmp_path / "swarm.key")
    with pytest.raises(ConfigError, match="is there already"):
        SwarmKey.generate(OWNER).save(tmp_path / "swarm.key")
    assert SwarmKey.load(tmp_path / "swarm.key") == KEY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rubbish",
        "version = 1",
        'version = 2\nkey = "AAAA"\nowner = "x"',
        f'version = 1\nkey = "AAAA"\nowner = "{OWNER.peer_id}"',
        f'version = 1\nkey = 7\nowner = "{OWNER.peer_id}"',
        f'version = 1\nkey = "{"A" * 43}="\nowner = "12D3KooWrubbish"',
        "\xff\xfe",
    ],
)
def test_what_is_no_key_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "swarm.key"
    path.write_bytes(text.encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(ConfigError):
        SwarmKey.load(path)


def test_missing_key_file_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the swarm key file .*absent"):
        SwarmKey.load(tmp_path / "absent")


def test_secret_is_not_printed() -> None:
    assert repr(KEY.secret) not in repr(KEY)
    assert KEY.secret.hex() not in repr(KEY)


def test_handshakes_agree_only_on_the_same_secret_and_owner() -> None:
    other_owner = SwarmKey(KEY.secret, Identity.generate().peer_id)
    other_secret = SwarmKey(bytes(32), KEY.owner)
    assert KEY.handshake_secret == SwarmKey(KEY.secret, KEY.owner).handshake_secret
    assert len({key.handshake_secret for key in (KEY, other_owner, other_secret)}) == 3
    assert len({key.swarm_id for key in (KEY, other_owner, other_secret)}) == 3


def test_key_of_wrong_size_or_owner_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 secret bytes, got 31"):
        SwarmKey(bytes(31), OWNER.peer_id)
    with pytest.raises(ConfigError, match="is a peer id"):
        SwarmKey(bytes(32), PeerId("somebody"))
