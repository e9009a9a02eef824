"""Who may come in now: strangers at the door, before their handshakes and during them. Pure; times are the caller's.

A handshake costs some milliseconds in the thread that also carries everybody's sessions, and a stranger can ask for
as many as he likes. So:

- **In turn.** Handshakes get a share of the time, of which some is saved up for a burst. Beyond, they wait, and
  addresses take turns, however many knock from each. From one address the newest goes first: who has waited long has
  probably given up.
- **Not for ever.** Only so many are at the door at once, those that say nothing or stop in the middle among them. One
  more, and the address with the most of them loses its oldest.
- **Not again.** An address whose handshakes keep failing finds the door shut for a while. (Not where somebody from
  there is connected, says `listening.py`: many share an address, and to wait for one's turn does for them.)

The deadlines of each one are the shell's, `listening.py`.
"""

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.offences import Offences
from p2pswarm.net.pace import Pace
from p2pswarm.net.path import ConnectionPath

FIRST_ESTIMATE_S = 0.003
"""Of a handshake's CPU time: what it takes on two cores of 2020."""
ESTIMATE_WEIGHT = 0.1
"""Of the newest handshake in the estimate."""
IP6_HOST_BITS = 64
"""What a household or a rented machine gets: nobody has to come twice from the same of its addresses."""
TOLERATED_FAILURES = 32
FAILURE_PERIOD_S = 60.0
FIRST_BAR_S = 10.0
LONGEST_BAR_S = 600.0


class Source(NamedTuple):
    """Where somebody comes from: an address, the /64 of one, or the relay between."""

    name: str
    is_relay: bool = False
    """Then it is not to blame."""

    def __str__(self) -> str:
        return self.name


def source_of(path: ConnectionPath) -> Source:
    if path.relay is not None:
        return Source(path.relay, is_relay=True)
    if path.remote is None:
        return Source("unknown")
    if path.remote.kind == "ip6":
        return Source(str(ipaddress.ip_network((path.remote.host, IP6_HOST_BITS), strict=False)))
    return Source(path.remote.host)


@dataclass(eq=False, slots=True)
class Entrant:
    """Somebody at the door."""

    source: Source
    drop: Callable[[], None]
    """Called to end it: another one needs the room. It still has to `leave`."""
    let_in: Callable[[], None] = field(default=lambda: None)
    """Called when its handshake may begin."""
    expected_s: float = 0.0
    """What its handshake was charged when it was let in."""


class Admission:
    """Everybody at the door of one node."""

    def __init__(self, config: NetworkConfig, now_s: float) -> None:
        self._max_entrants = config.max_entrants
        self._pace = Pace(config.handshake_share, config.handshake_burst_s, now_s)
        self._estimate_s = FIRST_ESTIMATE_S
        self._present: dict[Entrant, None] = {}
        """In the order in which they came."""
        self._num_by_source: Counter[Source] = Counter()
        self._waiting: OrderedDict[Source, list[Entrant]] = OrderedDict()
        """The source that is next comes first; of its entrants the newest is last."""
        self._failures: Offences[Source] = Offences(
            tolerated=TOLERATED_FAILURES,
            period_s=FAILURE_PERIOD_S,
            first_bar_s=FIRST_BAR_S,
            longest_bar_s=LONGEST_BAR_S,
        )

    @property
    def num_present(self) -> int:
        return len(self._present)

    def arrive(self, source: Source, drop: Callable[[], None]) -> Entrant:
        """Somebody new at the door, perhaps in the place of another."""
        entrant = Entrant(source, drop)
        self._present[entrant] = None
        self._num_by_source[source] += 1
        if len(self._present) > self._max_entrants:
            self._drop_oldest_of_greediest()
        return entrant

    def ask(self, entrant: Entrant, let_in: Callable[[], None]) -> None:
        """It has said something: from now on it waits for its turn. `let_in_next` gives it."""
        if entrant in self._present:
            entrant.let_in = let_in
            self._waiting.setdefault(entrant.source, []).append(entrant)

    def let_in_next(self, now_s: float) -> float | None:
        """Lets in whose turn it is, one at most; when to call this again, None: when somebody has asked."""
        if not self._waiting:
            return None
        ready_at_s = self._pace.ready_at_s(now_s)
        if ready_at_s <= now_s:
            entrant = self._next_waiting()
            entrant.expected_s = self._estimate_s
            self._pace.spend(entrant.expected_s, now_s)
            entrant.let_in()
        return ready_at_s

    def leave(self, entrant: Entrant, spent_s: float, now_s: float) -> None:
        """It is in, or has gone; its handshake took `spent_s` of CPU time. Once for each that has arrived."""
        if entrant in self._present:
            self._remove(entrant)
        self._pace.spend(spent_s - entrant.expected_s, now_s)
        if spent_s:
            self._estimate_s += ESTIMATE_WEIGHT * (spent_s - self._estimate_s)

    def failed(self, source: Source, now_s: float) -> bool:
        """A handshake came to nothing, or was one too many; whether the door is shut to the source from now on."""
        return not source.is_relay and self._failures.commit(source, now_s)

    def is_barred(self, source: Source, now_s: float) -> bool:
        return self._failures.is_barred(source, now_s)

    def _next_waiting(self) -> Entrant:
        source, entrants = next(iter(self._waiting.items()))
        entrant = entrants.pop()
        if entrants:
            self._waiting.move_to_end(source)
        else:
            del self._waiting[source]
        return entrant

    def _drop_oldest_of_greediest(self) -> None:
        greediest = max(self._num_by_source.values())
        oldest = next(entrant for entrant in self._present if self._num_by_source[entrant.source] == greediest)
        self._remove(oldest)
        oldest.drop()

    def _remove(self, entrant: Entrant) -> None:
        del self._present[entrant]
        self._num_by_source[entrant.source] -= 1
        if not self._num_by_source[entrant.source]:
            del self._num_by_source[entrant.source]
        waiting = self._waiting.get(entrant.source, [])
        if entrant in waiting:
            waiting.remove(entrant)
            if not waiting:
                del self._waiting[entrant.source]
