"""`swarm invite`: the one string with which somebody joins a private swarm."""

import argparse

from p2pswarm.core.errors import ConfigError
from p2pswarm.net.addresses import split_peer_address
from p2pswarm.net.private.invitation import Invitation, accept_invitations
from p2pswarm.net.private.swarm_key import SwarmKey


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    addresses, key = accept_invitations(arguments.peers, SwarmKey.load(arguments.swarm_key))
    assert key is not None, "one was given"
    if not addresses:
        raise ConfigError("an invitation needs the address of a node that stays up: give one, or several, with --peers")
    for address in addresses:
        split_peer_address(address)
    print(Invitation(key, addresses))
    return 0
