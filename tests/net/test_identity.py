import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.net.identity import (
    Identity,
    base58_decode,
    base58_encode,
    is_peer_id,
    peer_id_of,
    public_key_of,
    verify_signature,
)

SEED = bytes(range(32))


def test_peer_id_is_the_one_libp2p_gives_the_same_key() -> None:
    assert Identity.generate(bytes(32)).peer_id == "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


def test_public_key_can_be_read_out_of_the_peer_id() -> None:
    identity = Identity.generate(SEED)
    assert public_key_of(identity.peer_id).public_bytes_raw() == identity.public_bytes
    assert peer_id_of(identity.public_bytes) == identity.peer_id


def test_new_identities_differ_and_seeded_ones_do_not() -> None:
    assert Identity.generate().peer_id != Identity.generate().peer_id
    assert Identity.generate(SEED).peer_id == Identity.generate(SEED).peer_id


def test_private_key_is_not_printed() -> None:
    identity = Identity.generate(SEED)
    assert SEED.hex() not in repr(identity)
    assert repr(SEED) not in repr(identity)


@pytest.mark.parametrize("text", ["", "1", "rubbish", "0OIl", "Qm" + "a" * 44, "12D3KooW", "1" * 1_000_000])
def test_what_is_no_ed25519_peer_id_is_told(text: str) -> None:
    assert not is_peer_id(text)
    assert not verify_signature(PeerId(text), b"data", bytes(64))
    with pytest.raises(ProtocolViolation):
        public_key_of(PeerId(text))


@given(st.binary(max_size=45))
def test_base58_survives(data: bytes) -> None:
    assert base58_decode(base58_encode(data)) == data


@given(data=st.binary(max_size=100), position=st.integers(0, 511))
def test_signature_holds_for_its_data_and_key_only(data: bytes, position: int) -> None:
    identity, stranger = Identity.generate(SEED), Identity.generate(bytes(32))
    signature = identity.sign(data)
    assert verify_signature(identity.peer_id, data, signature)
    assert not verify_signature(stranger.peer_id, data, signature)
    assert not verify_signature(identity.peer_id, data + b"!", signature)
    forged = bytearray(signature)
    forged[position // 8] ^= 1 << position % 8
    assert not verify_signature(identity.peer_id, data, bytes(forged))


def test_file_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "server.key"
    identity = Identity.load_or_create(path)
    assert Identity.load_or_create(path).peer_id == identity.peer_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["server.key"]


def test_identity_made_by_another_process_at_the_same_time_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "server.key"
    first = Identity.load_or_create(path)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert Identity.load_or_create(path).peer_id == first.peer_id


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: b"", lambda data: bytes(68), lambda data: data[:-1] + bytes([data[-1] ^ 1])],
)
def test_damaged_file_is_refused_with_its_name(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "server.key"
    Identity.load_or_create(path)
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"server\.key"):
        Identity.load_or_create(path)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "server.key"
    Identity.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Identity.load_or_create(path)


def test_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="identity file"):
        Identity.load_or_create(tmp_path / "file" / "server.key")
