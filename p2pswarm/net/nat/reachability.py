"""Whether this node can be dialled: a verdict over what others found who tried. Pure.

One report says at which host a peer sees us, and which of our ports it could open a fresh connection to there
(`net/nat/probing.py`). Reports count by host, because a neighbour on the same network and a node beyond the router see
different ones: private is who cannot be dialled at some host at which others see him, public who can at each. So a
machine behind a router is private although its neighbours reach it, and a swarm within one room is public to itself.
Peers who see us at one host vote; what was found at a host is remembered while others are asked.

A verdict once settled changes only when two rounds of asking in a row say otherwise, since a peer may lie, and a packet
may get lost; after a change of this machine's own addresses one round is enough.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from p2pswarm.core.ids import PeerId
from p2pswarm.core.reachability import Reachability
from p2pswarm.net.addresses import TcpAddress

AGREEING_PROBERS = 2
"""One peer's word is enough only where nobody else could be asked."""
ROUNDS_TO_CHANGE = 2
MAX_ROUNDS_REMEMBERED = 12
"""An hour: longer than nobody is asked by chance who sees us at some host; then nobody sees us there any more."""
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
class HostFinding:
    """What those found who see us at one host."""

    reachability: Reachability
    reached: tuple[TcpAddress, ...]
    num_rounds_ago: int = 0


@dataclass(frozen=True, slots=True)
class ReachabilityState:
    """What is known, and how far it is doubted."""

    reachability: Reachability = Reachability.UNKNOWN
    confirmed: tuple[TcpAddress, ...] = ()
    """Where others got through to us."""
    num_dissents: int = 0
    """Rounds in a row that said the opposite."""
    findings: Mapping[str, HostFinding] = field(default_factory=dict)
    """By host. Those of earlier rounds count where nobody was asked this time who sees us there."""

    def after(self, reports: Sequence[ProbeReport]) -> "ReachabilityState":
        """The state after a round of asking; without reports as it was."""
        if not reports:
            return self
        findings = _remembered(self.findings) | _found(reports)
        verdict = _verdict(findings.values())
        if verdict is Reachability.UNKNOWN:
            return self
        is_settled_otherwise = self.reachability not in (verdict, Reachability.UNKNOWN)
        if is_settled_otherwise and self.num_dissents + 1 < ROUNDS_TO_CHANGE:
            return replace(self, num_dissents=self.num_dissents + 1, findings=findings)
        newest_first = sorted(findings.values(), key=lambda finding: finding.num_rounds_ago)
        confirmed = [address for finding in newest_first for address in finding.reached]
        return ReachabilityState(verdict, tuple(confirmed[:MAX_CONFIRMED]), findings=findings)

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


def _remembered(findings: Mapping[str, HostFinding]) -> dict[str, HostFinding]:
    aged = {host: replace(one, num_rounds_ago=one.num_rounds_ago + 1) for host, one in findings.items()}
    return {host: one for host, one in aged.items() if one.num_rounds_ago <= MAX_ROUNDS_REMEMBERED}


def _found(reports: Sequence[ProbeReport]) -> dict[str, HostFinding]:
    """Of one round, by host, where those who see us there agree."""
    by_host: dict[str, dict[PeerId, ProbeReport]] = defaultdict(dict)
    for report in reports:
        by_host[report.seen_at.host][report.prober] = report
    findings = {}
    for host, by_prober in by_host.items():
        verdict = _majority([bool(report.reached_ports) for report in by_prober.values()])
        if verdict is not Reachability.UNKNOWN:
            reached = [address for report in by_prober.values() for address in report.reached]
            findings[host] = HostFinding(
                verdict, tuple(dict.fromkeys(reached)) if verdict is Reachability.PUBLIC else ()
            )
    return findings


def _majority(reached: Sequence[bool]) -> Reachability:
    num_reached, num_needed = sum(reached), min(AGREEING_PROBERS, len(reached))
    num_failed = len(reached) - num_reached
    if num_reached >= num_needed and num_reached > num_failed:
        return Reachability.PUBLIC
    if num_failed >= num_needed and num_failed > num_reached:
        return Reachability.PRIVATE
    return Reachability.UNKNOWN


def _verdict(findings: Iterable[HostFinding]) -> Reachability:
    found = {finding.reachability for finding in findings}
    return next((one for one in (Reachability.PRIVATE, Reachability.PUBLIC) if one in found), Reachability.UNKNOWN)
