"""`swarm id`: the peer id that this user's commands have in private swarms, for the owner's list of members."""

import argparse

from p2pswarm.net.identity import Identity
from swarm_cli.entrance import default_identity_path


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    print(Identity.load_or_create(arguments.identity or default_identity_path()).peer_id)
    return 0
