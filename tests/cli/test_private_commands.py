"""Keys, invitations and member lists, as the owner of a private swarm makes them."""

from pathlib import Path

import pytest

from p2pswarm.net.identity import Identity
from p2pswarm.net.private.invitation import Invitation
from p2pswarm.net.private.member_list import MemberList
from p2pswarm.net.private.swarm_key import SwarmKey
from swarm_cli.__main__ import run

ANNA, BERT = (Identity.generate(bytes([number]) * 32).peer_id for number in (1, 2))
ADDRESS = f"/ip4/192.0.2.7/tcp/4001/p2p/{ANNA}"


@pytest.fixture
def key_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "choir.key"
    assert run(["keygen", str(path)]) == 0
    capsys.readouterr()
    return path


def test_key_names_the_owner_whose_key_lies_beside_it(key_path: Path) -> None:
    assert SwarmKey.load(key_path).owner == Identity.load(key_path.with_name("choir.key.owner")).peer_id


def test_key_that_is_there_is_not_made_again(key_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = key_path.read_bytes()
    assert run(["keygen", str(key_path)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert key_path.read_bytes() == before


def test_invitation_holds_key_and_addresses(key_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["invite", "--swarm-key", str(key_path), "--peers", ADDRESS]) == 0
    assert Invitation.parse(capsys.readouterr().out) == Invitation(SwarmKey.load(key_path), (ADDRESS,))


def test_invitation_needs_an_address_that_can_be(key_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["invite", "--swarm-key", str(key_path), "--peers", "home"]) == 1
    assert "home" in capsys.readouterr().err


def test_members_are_added_removed_and_listed(key_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--swarm-key", str(key_path)]
    list_path = key_path.with_name("choir.key.members")
    assert run(["members", "add", ANNA, BERT, *flags]) == 0
    first = MemberList.load(list_path)
    assert run(["members", "remove", BERT, *flags]) == 0
    second = MemberList.load(list_path)
    assert [first.has(BERT), second.has(BERT), second.has(ANNA)] == [True, False, True]
    assert second.version > first.version
    capsys.readouterr()
    assert run(["members", "list", *flags]) == 0
    assert capsys.readouterr().out.split() == [ANNA]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["list"], "cannot read the member list"),
        (["add", "somebody"], "a member is a peer id"),
        (["add"], "name the members by their peer ids"),
        (["remove", ANNA], "not in the list"),
    ],
)
def test_mistakes_of_the_owner_are_named(
    key_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert run(["members", *words, "--swarm-key", str(key_path)]) == 1
    assert complaint in capsys.readouterr().err
    assert not key_path.with_name("choir.key.members").exists()


def test_who_has_the_key_alone_cannot_change_the_list(key_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key_path.with_name("choir.key.owner").unlink()
    assert run(["members", "add", ANNA, "--swarm-key", str(key_path)]) == 1
    assert "cannot read the identity file" in capsys.readouterr().err


def test_own_peer_id_is_the_same_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = []
    for _ in range(2):
        assert run(["id", "--identity", str(tmp_path / "mine.key")]) == 0
        ids.append(capsys.readouterr().out)
    assert ids[0] == ids[1] == f"{Identity.load(tmp_path / 'mine.key').peer_id}\n"
