"""Whether a node can be dialled from outside, as far as it is known."""

from enum import Enum


class Reachability(Enum):
    """What others found who tried."""

    PUBLIC = "public"
    """Whoever was asked could dial it, or its operator says so."""
    PRIVATE = "private"
    """Some part of the swarm cannot dial it: it sits behind a router or a firewall."""
    UNKNOWN = "unknown"
    """Nobody could be asked yet."""
