"""What makes a node part of a private swarm: the key, and the members that it knows of."""

from dataclasses import dataclass
from pathlib import Path

from p2pswarm.net.private.members import Members
from p2pswarm.net.private.swarm_key import SwarmKey


@dataclass(frozen=True, slots=True)
class PrivateSwarm:
    """One node's part in it."""

    key: SwarmKey
    members: Members

    @classmethod
    def of(cls, key: SwarmKey, *, given: Path | None = None, kept: Path | None = None) -> "PrivateSwarm":
        """With the operator's member list in the file `given`, and the newest known one in `kept`.

        Raises `ConfigError`: the given list is missing, damaged or belongs to another key.
        """
        return cls(key, Members(key.owner, given=given, kept=kept))
