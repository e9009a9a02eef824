"""A route: which server runs which blocks, in order. Plain data; `routing/planner.py` says how one is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

from p2pswarm.core.ids import PeerId
from p2pswarm.core.span import Span


@dataclass(frozen=True, slots=True, order=True)
class Hop:
    """One server's share of a route; `span` may be a part of what the server holds."""

    peer_id: PeerId
    span: Span

    def __str__(self) -> str:
        return f"{self.span} {short_peer(self.peer_id)}"


@dataclass(frozen=True, slots=True)
class Route:
    """Hops whose spans follow one another without a gap; never empty."""

    hops: tuple[Hop, ...]
    cost_us: int = 0
    """What the planner expects one decoded token to take; 0 where it did not look for the fastest route."""

    def __post_init__(self) -> None:
        if not self.hops:
            raise ValueError("a route has at least one hop")
        for before, after in zip(self.hops, self.hops[1:], strict=False):
            if before.span.end != after.span.start:
                raise ValueError(f"hop {before} is followed by {after}, which does not start at its end")

    @property
    def span(self) -> Span:
        return Span(self.hops[0].span.start, self.hops[-1].span.end)

    def __str__(self) -> str:
        return " -> ".join(str(hop) for hop in self.hops)


def short_peer(peer_id: PeerId) -> str:
    """The end of a peer id, which tells peers apart (ed25519 ids all begin alike)."""
    return f"…{peer_id[-6:]}"


def short_peers(peer_ids: Sequence[PeerId], shown: int = 5) -> str:
    """A few peer ids for a message, and how many more there are."""
    names = ", ".join(short_peer(peer_id) for peer_id in peer_ids[:shown])
    return names if len(peer_ids) <= shown else f"{names} and {len(peer_ids) - shown} more"
