"""`swarm keygen`: the key of a new private swarm, and the key of its owner."""

import argparse
from pathlib import Path

from p2pswarm.core.errors import ConfigError
from p2pswarm.net.identity import Identity
from p2pswarm.net.private.swarm_key import SwarmKey
from swarm_cli.members import owner_path


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    key_path: Path = arguments.file
    owner = Identity.generate()
    if owner_path(key_path).exists():
        raise ConfigError(f"{owner_path(key_path)} is there already: choose another name, or remove it first")
    SwarmKey.generate(owner).save(key_path)
    owner.save(owner_path(key_path))
    print(
        f"{key_path}: the key. Each node of the swarm needs it: swarmd start MODEL --swarm-key {key_path}\n"
        f"{owner_path(key_path)}: its owner's key. Keep it to yourself: with it you say who is a member (swarm members)"
    )
    return 0
