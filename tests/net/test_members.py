import logging
import os
from pathlib import Path

import pytest
import trio

from p2pswarm.core.errors import ConfigError, NotAMember, ProtocolViolation
from p2pswarm.net.identity import Identity
from p2pswarm.net.private.member_list import MemberList
from p2pswarm.net.private.members import Members

OWNER = Identity.generate(bytes(32))
STRANGER = Identity.generate(bytes(range(32)))
FIRST, SECOND, THIRD = (Identity.generate(bytes([number]) * 32).peer_id for number in (1, 2, 3))


def test_everybody_is_a_member_until_there_is_a_list() -> None:
    members = Members(OWNER.peer_id)
    assert members.has(FIRST)
    assert members.version == 0
    assert members.take(MemberList.sign(OWNER, 1, [SECOND]))
    assert not members.has(FIRST)
    assert members.has(SECOND)


def test_only_newer_lists_count() -> None:
    members = Members(OWNER.peer_id)
    assert members.take(MemberList.sign(OWNER, 5, [FIRST]))
    assert not members.take(MemberList.sign(OWNER, 5, [SECOND]))
    assert not members.take(MemberList.sign(OWNER, 4, [SECOND]))
    assert members.has(FIRST)
    assert members.take(MemberList.sign(OWNER, 6, [SECOND]))
    assert not members.has(FIRST)


def test_list_of_another_owner_is_refused() -> None:
    members = Members(OWNER.peer_id)
    with pytest.raises(ProtocolViolation, match="wanted one by"):
        members.take(MemberList.sign(STRANGER, 9, [FIRST]))
    assert members.newest is None


def test_node_that_is_not_listed_is_told_so() -> None:
    members = Members(OWNER.peer_id)
    members.check_own(FIRST)
    members.take(MemberList.sign(OWNER, 7, [SECOND]))
    members.check_own(SECOND)
    with pytest.raises(NotAMember, match=f"{FIRST}, this node, is not a member .*version 7"):
        members.check_own(FIRST)


def test_removed_member_stays_out_over_a_restart(tmp_path: Path) -> None:
    given, kept = tmp_path / "given", tmp_path / "kept"
    given.write_bytes(MemberList.sign(OWNER, 1, [FIRST, SECOND]).text)
    Members(OWNER.peer_id, given=given, kept=kept).take(MemberList.sign(OWNER, 2, [SECOND]))
    restarted = Members(OWNER.peer_id, given=given, kept=kept)
    assert restarted.version == 2
    assert not restarted.has(FIRST)


def test_newer_list_in_the_operators_file_wins_over_the_kept_one(tmp_path: Path) -> None:
    given, kept = tmp_path / "given", tmp_path / "kept"
    kept.write_bytes(MemberList.sign(OWNER, 1, [FIRST]).text)
    given.write_bytes(MemberList.sign(OWNER, 2, [SECOND]).text)
    assert Members(OWNER.peer_id, given=given, kept=kept).has(SECOND)
    assert MemberList.load(kept).version == 2


def test_damaged_kept_list_is_told_and_left_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"rubbish")
    assert Members(OWNER.peer_id, kept=kept).newest is None
    assert "of no use" in caplog.text


def test_file_of_another_swarm_is_a_mistake_of_the_operators(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.write_bytes(MemberList.sign(STRANGER, 1, [FIRST]).text)
    with pytest.raises(ConfigError, match="belongs to another swarm key"):
        Members(OWNER.peer_id, given=given)
    with pytest.raises(ConfigError, match="cannot read"):
        Members(OWNER.peer_id, given=tmp_path / "absent")


def test_changed_file_is_taken_up_and_a_damaged_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = tmp_path / "given"
    write(given, MemberList.sign(OWNER, 1, [FIRST]).text, changed_s=100)
    members = Members(OWNER.peer_id, given=given)
    members.look_at_file()
    assert members.version == 1
    write(given, b"rubbish", changed_s=200)
    with caplog.at_level(logging.WARNING):
        members.look_at_file()
    assert members.version == 1
    assert "cannot be used" in caplog.text
    write(given, MemberList.sign(OWNER, 2, [SECOND]).text, changed_s=300)
    members.look_at_file()
    assert members.version == 2


async def test_who_waits_is_woken_by_a_newer_list(autojump_clock: trio.testing.MockClock) -> None:
    members = Members(OWNER.peer_id)
    members.take(MemberList.sign(OWNER, 1, [FIRST]))
    await members.wait_newer_than(0)
    with trio.move_on_after(60) as too_early:
        await members.wait_newer_than(1)
    assert too_early.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(members.wait_newer_than, 1)
        await trio.testing.wait_all_tasks_blocked()
        members.take(MemberList.sign(OWNER, 2, [FIRST]))


def write(path: Path, text: bytes, changed_s: int) -> None:
    path.write_bytes(text)
    os.utime(path, (changed_s, changed_s))


async def test_node_notices_that_it_was_removed(autojump_clock: trio.testing.MockClock) -> None:
    members = Members(OWNER.peer_id)
    members.take(MemberList.sign(OWNER, 1, [SECOND]))  # without it already: the list from before it was added
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def notice() -> None:
            with pytest.raises(NotAMember):
                await members.raise_when_removed(FIRST)

        for version, listed in ((2, [FIRST, SECOND]), (3, [SECOND])):
            await trio.testing.wait_all_tasks_blocked()
            members.take(MemberList.sign(OWNER, version, listed))
