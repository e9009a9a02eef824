"""The private swarm that a node is part of, by its flags: `--swarm-key`, `--members`, or an invitation in `--peers`."""

from pathlib import Path

from p2pswarm.core.errors import ConfigError
from p2pswarm.net.private.invitation import accept_invitations
from p2pswarm.net.private.private_swarm import PrivateSwarm
from p2pswarm.net.private.swarm_key import SwarmKey
from swarmd.config import NodeConfig


def private_swarm_of(config: NodeConfig, identity_path: Path) -> PrivateSwarm | None:
    """None for a node of the public swarm. Raises `ConfigError`: a key or list that is missing or of another swarm.

    The newest member list is kept beside the identity.
    """
    given = None if config.swarm_key is None else SwarmKey.load(config.swarm_key)
    _, key = accept_invitations(config.peers, given)
    if key is not None:
        return PrivateSwarm.of(key, given=config.members, kept=identity_path.with_suffix(f".{key.swarm_id}.members"))
    if config.members is not None:
        raise ConfigError("members: a swarm without a key has no members: give --swarm-key too")
    return None
