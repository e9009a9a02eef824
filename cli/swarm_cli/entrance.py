"""Which swarm a command enters, and as whom: from `--peers`, `--swarm-key` and `--identity`."""

import argparse
from pathlib import Path
from typing import TypedDict

import platformdirs

from p2pswarm.net.identity import Identity
from p2pswarm.net.private.invitation import accept_invitations
from p2pswarm.net.private.swarm_key import SwarmKey


class Entrance(TypedDict):
    """Arguments of `open_swarm` and `join_swarm`."""

    identity: Identity | None
    swarm_key: SwarmKey | None


def entrance(arguments: argparse.Namespace) -> Entrance:
    """A private swarm knows its members by their peer ids, so there a user has the same one each time."""
    given = None if arguments.swarm_key is None else SwarmKey.load(arguments.swarm_key)
    _, key = accept_invitations(arguments.peers, given)
    path: Path | None = arguments.identity
    if path is None and key is not None:
        path = default_identity_path()
    return {"identity": None if path is None else Identity.load_or_create(path), "swarm_key": key}


def default_identity_path() -> Path:
    """Of the user's commands; servers have their own."""
    return platformdirs.user_data_path("p2pswarm") / "identities" / "client.key"
