"""`swarm members`: the owner's list of who may be in a private swarm.

The list is a file beside the swarm's key, signed with the owner's; peer ids are kept in it as comments. Nodes that were
started with `--members` notice a change within seconds and pass it on; here nothing is sent anywhere.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from p2pswarm.core.clock import SystemClock
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.identity import Identity, is_peer_id
from p2pswarm.net.private.member_list import MemberList
from p2pswarm.net.private.swarm_key import SwarmKey
from p2pswarm.net.whole_files import replace_file

COMMENT = "# "


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    key = SwarmKey.load(arguments.swarm_key)
    path = arguments.members or arguments.swarm_key.with_name(f"{arguments.swarm_key.name}.members")
    if arguments.change == "list":
        print("\n".join(_peer_ids(path, _load(path, key))))
        return 0
    owner = Identity.load(owner_path(arguments.swarm_key))
    before = _load(path, key) if path.exists() else MemberList.sign(owner, 0, ())
    given = _checked(arguments.peer_ids)
    after = _changed(before, owner, arguments.change, given, int(SystemClock().unix_time_s()))
    known = {*_peer_ids(path, before), *given} if path.exists() else set(given)
    comments = "".join(f"{COMMENT}{peer_id}\n" for peer_id in sorted(known) if after.has(peer_id))
    try:
        replace_file(path, after.text + comments.encode())
    except OSError as error:
        raise ConfigError(f"cannot write the member list {path}: {error.strerror}") from error
    print(
        f"{path}: {len(after.members)} members. Nodes with --members {path} take it up within seconds; "
        "whoever is not on it is then refused."
    )
    return 0


def owner_path(key_path: Path) -> Path:
    """Where `swarm keygen` puts the owner's key."""
    return key_path.with_name(f"{key_path.name}.owner")


def _changed(before: MemberList, owner: Identity, change: str, given: Sequence[PeerId], now_s: int) -> MemberList:
    if change == "add":
        return before.changed_by(owner, now_s, add=given)
    absent = [peer_id for peer_id in given if not before.has(peer_id)]
    if absent:
        raise ConfigError(f"not in the list, so not to be removed: {', '.join(absent)}")
    return before.changed_by(owner, now_s, remove=given)


def _load(path: Path, key: SwarmKey) -> MemberList:
    found = MemberList.load(path)
    if found.owner != key.owner:
        raise ConfigError(f"{path} is the list of another swarm: signed by {found.owner}, wanted {key.owner}")
    return found


def _peer_ids(path: Path, members: MemberList) -> list[PeerId]:
    """The members by their ids, as the file's comments have them; comments that lie are left out."""
    lines = path.read_text().splitlines()
    noted = [PeerId(line.removeprefix(COMMENT)) for line in lines if line.startswith(COMMENT)]
    return sorted(peer_id for peer_id in noted if members.has(peer_id))


def _checked(peer_ids: Sequence[str]) -> list[PeerId]:
    if not peer_ids:
        raise ConfigError("name the members by their peer ids (`swarm id` prints one's own)")
    for peer_id in peer_ids:
        if not is_peer_id(peer_id):
            raise ConfigError(f"a member is a peer id (12D3KooW..., see `swarm id`), got {peer_id!r}")
    return [PeerId(peer_id) for peer_id in peer_ids]
