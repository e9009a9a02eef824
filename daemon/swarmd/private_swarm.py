"""The private swarm that a node is part of, by its flags: `--swarm-key`, `--members`, or an invitation in `--peers`."""

from pathlib import Path

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.private.invitation import accept_invitations
from p2pswarm.net.private.private_swarm import PrivateSwarm
from p2pswarm.net.private.swarm_key import SwarmKey
from swarmd.config import NodeConfig


def private_swarm_of(config: NodeConfig, identity_path: Path, own: PeerId) -> PrivateSwarm | None:
    """None for a node of the open swarm. The newest member list is kept beside the identity.

    Raises `ConfigError`: a key or list that is missing or of another swarm, or a given list without this node, `own`.
    """
    given = None if config.swarm_key is None else SwarmKey.load(config.swarm_key)
    _, key = accept_invitations(config.peers, given)
    if key is None:
        if config.members is not None:
            raise ConfigError("members: a swarm without a key has no members: give --swarm-key too")
        return None
    kept = identity_path.with_suffix(f".{key.swarm_id}.members")
    private = PrivateSwarm.of(key, given=config.members, kept=kept)
    if config.members is not None and not private.members.has(own):
        raise ConfigError(
            f"members: {own}, this node, is not in {config.members}, so nobody would connect to it: "
            f"swarm members add {own} --swarm-key KEY"
        )
    return private
