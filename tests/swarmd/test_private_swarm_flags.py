"""The private swarm that a node's flags name, or an invitation among its peers."""

from pathlib import Path

import pytest

from p2pswarm.core.errors import ConfigError
from p2pswarm.net.identity import Identity
from p2pswarm.net.private.invitation import Invitation
from p2pswarm.net.private.member_list import MemberList
from p2pswarm.net.private.swarm_key import SwarmKey
from swarmd.config import NodeConfig
from swarmd.private_swarm import private_swarm_of

OWNER, NODE = (Identity.generate(bytes([number]) * 32) for number in (1, 2))
KEY = SwarmKey.generate(OWNER)
ADDRESS = f"/ip4/192.0.2.7/tcp/4001/p2p/{OWNER.peer_id}"
INVITATION = str(Invitation(KEY, (ADDRESS,)))


def key_file(folder: Path) -> Path:
    KEY.save(folder / "swarm.key")
    return folder / "swarm.key"


def test_node_without_a_key_is_of_the_open_swarm(tmp_path: Path) -> None:
    assert private_swarm_of(NodeConfig(peers=(ADDRESS,)), tmp_path / "node.key", NODE.peer_id) is None


def test_key_comes_from_a_file_or_an_invitation(tmp_path: Path) -> None:
    invited = NodeConfig(peers=(INVITATION,))
    for config in (NodeConfig(swarm_key=key_file(tmp_path)), invited):
        private = private_swarm_of(config, tmp_path / "node.key", NODE.peer_id)
        assert private is not None
        assert private.key == KEY
    assert invited.peer_addresses == (ADDRESS,)


def test_damaged_invitation_is_a_mistake_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="invitation is damaged"):
        NodeConfig(peers=(INVITATION[:-5],))


def test_list_of_members_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --swarm-key too"):
        private_swarm_of(NodeConfig(members=tmp_path / "members"), tmp_path / "node.key", NODE.peer_id)


def test_newest_list_is_kept_beside_the_identity(tmp_path: Path) -> None:
    given = tmp_path / "members"
    given.write_bytes(MemberList.sign(OWNER, 3, [NODE.peer_id]).text)
    private_swarm_of(NodeConfig(swarm_key=key_file(tmp_path), members=given), tmp_path / "node.key", NODE.peer_id)
    restarted = private_swarm_of(NodeConfig(peers=(INVITATION,)), tmp_path / "node.key", NODE.peer_id)
    assert restarted is not None
    assert restarted.members.version == 3


def test_node_that_its_own_list_leaves_out_does_not_start(tmp_path: Path) -> None:
    given = tmp_path / "members"
    given.write_bytes(MemberList.sign(OWNER, 3, [OWNER.peer_id]).text)
    with pytest.raises(ConfigError, match=f"swarm members add {NODE.peer_id}"):
        private_swarm_of(NodeConfig(swarm_key=key_file(tmp_path), members=given), tmp_path / "node.key", NODE.peer_id)
