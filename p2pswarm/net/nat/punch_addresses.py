"""At which addresses two nodes try each other when they punch. Pure."""

import ipaddress
from collections.abc import Mapping, Sequence

from p2pswarm.net.addresses import TcpAddress, expand_wildcards

WILDCARDS = {"ip4": "0.0.0.0", "ip6": "::"}


def own_candidates(
    seen_at: TcpAddress | None, ports: Mapping[str, int], interface_hosts: Sequence[str]
) -> list[TcpAddress]:
    """Where a peer may get through to us, the likeliest first.

    `seen_at`: where a relay sees us; when that connection is from our own port, this is the router's address for it.
    Most routers keep the number of a port, so the same one there is tried too. Then those of our own network, for a
    peer that is in it. `ports`: ours, by kind of address.
    """
    candidates: list[TcpAddress] = []
    if seen_at is not None:
        candidates.append(seen_at)
        if seen_at.kind in ports:
            candidates.append(TcpAddress(seen_at.kind, seen_at.host, ports[seen_at.kind]))
    wildcards = [TcpAddress(kind, WILDCARDS[kind], port) for kind, port in ports.items()]
    near = expand_wildcards(wildcards, interface_hosts)
    candidates += [address for address in near if not _is_of_one_machine(address)]
    return list(dict.fromkeys(candidates))


def worth_dialling(theirs: Sequence[TcpAddress], own: Sequence[TcpAddress]) -> list[TcpAddress]:
    """Of a peer's addresses those that can lead to it: not our own, nor those of one machine unless it is this one."""
    is_near = any(_is_of_one_machine(address) for address in own)
    return [address for address in theirs if address not in own and (is_near or not _is_of_one_machine(address))]


def _is_of_one_machine(address: TcpAddress) -> bool:
    ip = ipaddress.ip_address(address.host)
    return ip.is_loopback or ip.is_multicast or ip.is_link_local
