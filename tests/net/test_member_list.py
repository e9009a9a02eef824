from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.net.identity import Identity
from p2pswarm.net.private.member_list import MAX_MEMBERS, MAX_VERSION, MemberList

OWNER = Identity.generate(bytes(32))
STRANGER = Identity.generate(bytes(range(32)))
MEMBERS = [Identity.generate(bytes([number]) * 32).peer_id for number in range(1, 6)]


@given(members=st.sets(st.sampled_from(MEMBERS)), version=st.integers(1, MAX_VERSION))
@settings(deadline=None)
def test_list_survives_its_text(members: set[PeerId], version: int) -> None:
    made = MemberList.sign(OWNER, version, members)
    read = MemberList.parse(made.text)
    assert read == made
    assert {peer_id for peer_id in MEMBERS if read.has(peer_id)} == members
    assert (read.owner, read.version) == (OWNER.peer_id, version)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_list_with_one_byte_changed_is_refused(data: st.DataObject) -> None:
    text = bytearray(MemberList.sign(OWNER, 3, MEMBERS[:2]).text)
    at = data.draw(st.integers(0, text.index(b"signature ") - 1))
    text[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolViolation):
        MemberList.parse(bytes(text))


@given(st.binary(max_size=300))
def test_what_is_no_list_is_refused(text: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        MemberList.parse(text)


def test_list_signed_by_somebody_else_in_the_owners_name_is_refused() -> None:
    text = MemberList.sign(STRANGER, 1, MEMBERS).text.replace(STRANGER.peer_id.encode(), OWNER.peer_id.encode())
    with pytest.raises(ProtocolViolation, match="signature"):
        MemberList.parse(text)


def test_list_of_endless_length_is_refused_without_being_read() -> None:
    with pytest.raises(ProtocolViolation):
        MemberList.parse(b"p2pswarm members 1\n" * 1_000_000)


def test_largest_list_can_be_made_and_read() -> None:
    members = [PeerId(f"12D3KooW{number:044d}") for number in range(MAX_MEMBERS)]
    read = MemberList.parse(MemberList.sign(OWNER, 1, members).text)
    assert all(map(read.has, members))
    assert not read.has(OWNER.peer_id)
    with pytest.raises(ConfigError, match="10001"):
        MemberList.sign(OWNER, 1, [*members, OWNER.peer_id])


def test_change_raises_the_version_to_the_time_or_by_one() -> None:
    before = MemberList.sign(OWNER, 4, MEMBERS[:3])
    after = before.changed_by(OWNER, 1_800_000_000, add=[MEMBERS[4]], remove=[MEMBERS[0]])
    assert after.version == 1_800_000_000
    assert [after.has(peer_id) for peer_id in MEMBERS] == [False, True, True, False, True]
    assert after.changed_by(OWNER, 1_800_000_000).version == 1_800_000_001
    assert after.changed_by(OWNER, 1_700_000_000).version == 1_800_000_001


def test_only_the_owner_can_change_a_list() -> None:
    with pytest.raises(ConfigError, match="belongs to"):
        MemberList.sign(OWNER, 1, MEMBERS).changed_by(STRANGER, 2, add=[STRANGER.peer_id])


def test_list_names_nobody() -> None:
    text = MemberList.sign(OWNER, 1, MEMBERS).text
    assert not any(peer_id.encode() in text for peer_id in MEMBERS)


def test_file_may_have_comments(tmp_path: Path) -> None:
    made = MemberList.sign(OWNER, 1, MEMBERS)
    (tmp_path / "list").write_bytes(b"# of the choir\n" + made.text + b"# " + MEMBERS[0].encode())
    assert MemberList.load(tmp_path / "list") == made


def test_damaged_or_missing_file_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the member list"):
        MemberList.load(tmp_path / "absent")
    (tmp_path / "list").write_bytes(MemberList.sign(OWNER, 1, MEMBERS).text[:-20])
    with pytest.raises(ConfigError, match="not a member list"):
        MemberList.load(tmp_path / "list")
