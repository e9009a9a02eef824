"""Where a node tells others to dial it, by how it can be reached. Pure."""

from collections.abc import Sequence

from p2pswarm.core.reachability import Reachability
from p2pswarm.net.addresses import TcpAddress


def addresses_to_publish(
    reachability: Reachability,
    confirmed: Sequence[TcpAddress],
    listening: Sequence[TcpAddress],
    circuits: Sequence[str],
) -> tuple[str, ...] | None:
    """Transport parts of multiaddrs; None for those that it listens on, as they are at each moment.

    Who can be dialled is so where others got through (a router may forward a port, of another number), then where it
    listens. Who cannot is where at least its neighbours got through, and behind its relays.
    """
    if reachability is Reachability.PRIVATE:
        return (*map(str, confirmed), *circuits)
    forwarded = [address for address in confirmed if address not in listening]
    if reachability is Reachability.PUBLIC and forwarded:
        return tuple(map(str, (*forwarded, *listening)))
    return None


def dial_back_ports(listening: Sequence[TcpAddress], forwarded_port: int | None) -> list[int]:
    """The ports at which it may answer, those of IPv4 first; a router's `forwarded_port` before all."""
    by_family = sorted(listening, key=lambda address: address.kind)
    ports = [address.port for address in by_family]
    return list(dict.fromkeys([*([forwarded_port] if forwarded_port is not None else []), *ports]))
