"""Whether this node can be dialled: a verdict over what others found who tried. Pure.

One report says at which host a peer sees us, and which of our ports it could open a fresh connection to there
(`net/nat/probing.py`). Reports count by host, because a neighbour on the same network and a node beyond the router see
different ones: private is who cannot be dialled at some host at which others see him, public who can at each. So a
machine behind a router is private although its neighbours reach it, and a swarm within one room is public to itself.

A verdict once settled changes only when two rounds of asking in a row say otherwise, since a peer may lie, and a packet
may get lost; after a change of this machine's own addresses one round is enough.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

from p2pswarm.core.ids import PeerId
from p2pswarm.core.reachability import Reachability
from p2pswarm.net.addresses import TcpAddress

AGREEING_PROBERS = 2
"""One peer's word is enough only where nobody else could be asked."""
ROUNDS_TO_CHANGE = 2
CHECK_PERIOD_S = 300.0
"""Between two rounds while all is settled: routers forget, and operators change them."""
DOUBT_PERIOD_S = 10.0
"""While it is not."""
JITTER = 0.2
MAX_CONFIRMED = 8
"""As many as a contact of the DHT may have."""


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What one peer found."""

    prober: PeerId
    seen_at: TcpAddress
    """Where our connection to it comes from, as it sees it."""
    reached_ports: frozenset[int]
    """Of those that it was asked to dial, at the host at which it sees us."""

    @property
    def reached(self) -> list[TcpAddress]:
        """Where it got through to us."""
        return [TcpAddress(self.seen_at.kind, self.seen_at.host, port) for port in sorted(self.reached_ports)]


@dataclass(frozen=True, slots=True)
class ReachabilityState:
    """What is known, and how far it is doubted."""

    reachability: Reachability = Reachability.UNKNOWN
    confirmed: tuple[TcpAddress, ...] = ()
    """Where somebody got through to us."""
    num_dissents: int = 0
    """Rounds in a row that said the opposite."""

    def after(self, reports: Sequence[ProbeReport]) -> "ReachabilityState":
        """The state after a round of asking; without reports, or where they contradict each other, as it was."""
        verdicts = _verdicts_by_host(reports)
        verdict = _verdict(verdicts.values())
        if verdict is Reachability.UNKNOWN:
            return self
        is_change = verdict is not self.reachability
        if is_change and self.reachability is not Reachability.UNKNOWN and self.num_dissents + 1 < ROUNDS_TO_CHANGE:
            return replace(self, num_dissents=self.num_dissents + 1)
        before = () if is_change else self.confirmed
        still_true = [address for address in before if verdicts.get(address.host) is not Reachability.PRIVATE]
        reached = [address for report in reports for address in report.reached]
        confirmed = tuple(dict.fromkeys([*reached, *still_true]))[:MAX_CONFIRMED]
        return ReachabilityState(verdict, confirmed)

    def after_move(self) -> "ReachabilityState":
        """The state when this machine's own addresses have changed: the next round decides."""
        return ReachabilityState(self.reachability, num_dissents=ROUNDS_TO_CHANGE - 1)

    @property
    def is_settled(self) -> bool:
        return self.reachability is not Reachability.UNKNOWN and not self.num_dissents

    def next_check_s(self, random: Random) -> float:
        """Until the next round."""
        period_s = CHECK_PERIOD_S if self.is_settled else DOUBT_PERIOD_S
        return period_s * random.uniform(1 - JITTER, 1 + JITTER)


def _verdicts_by_host(reports: Sequence[ProbeReport]) -> dict[str, Reachability]:
    by_host: dict[str, dict[PeerId, bool]] = defaultdict(dict)
    for report in reports:
        by_host[report.seen_at.host][report.prober] = bool(report.reached_ports)
    return {host: _majority(list(by_prober.values())) for host, by_prober in by_host.items()}


def _majority(reached: list[bool]) -> Reachability:
    num_reached, num_needed = sum(reached), min(AGREEING_PROBERS, len(reached))
    num_failed = len(reached) - num_reached
    if num_reached >= num_needed and num_reached > num_failed:
        return Reachability.PUBLIC
    if num_failed >= num_needed and num_failed > num_reached:
        return Reachability.PRIVATE
    return Reachability.UNKNOWN


def _verdict(by_host: Iterable[Reachability]) -> Reachability:
    verdicts = set(by_host)
    for verdict in (Reachability.PRIVATE, Reachability.PUBLIC):
        if verdict in verdicts:
            return verdict
    return Reachability.UNKNOWN
