"""What a relay gives away, and to whom: reservations, circuits, bytes. Pure; times are the caller's.

It knows no streams: `relay.py` asks here before it does anything for a peer, and gives back what has ended.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.config import MIB
from p2pswarm.net.nat.relay_messages import CircuitLimit, RelayStatus
from p2pswarm.net.pace import Pace

RATE_BURST_S = 0.25
"""Saved up by idle circuits, so that a short message never waits for the rate; a prompt's states may go in one go."""


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """For a machine at home; None is no limit, and nothing may be 0."""

    max_reservations: int = 64
    """Each costs an open connection and nothing else; one for each peer."""
    reservation_s: float = 3600.0
    max_circuits: int = 32
    max_circuits_per_target: int = 8
    """So no server uses up the relay for the others. Each server is on two relays, which makes 16 clients at a time."""
    max_circuits_per_source: int = 8
    """A client has one for each server that it cannot reach otherwise."""
    circuit_s: float | None = 3600.0
    circuit_bytes: int | None = 4096 * MIB
    """Both directions together: 262,144 tokens there and back through a server, at 2048 dimensions in fp32."""
    rate_bytes_per_s: float | None = 8.0 * MIB
    """Of all circuits together, each byte counted once: half of a home line of 150 Mbit/s, which it takes both ways."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"a relay's {name} is above 0, or None for no limit, got {value}")

    @property
    def announced(self) -> CircuitLimit:
        """What the ends of a circuit are told."""
        return CircuitLimit(None if self.circuit_s is None else round(self.circuit_s), self.circuit_bytes)


@dataclass(eq=False, slots=True)
class Circuit:
    """One that is open, or about to be."""

    source: PeerId
    target: PeerId
    relayed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RelayStatistics:
    num_reservations: int
    num_circuits: int
    relayed_bytes: int
    num_refused: int


@dataclass(slots=True)
class RelayAccounts:
    """Who holds what at the moment."""

    limits: RelayLimits
    _expiries_s: dict[PeerId, float] = field(default_factory=dict)
    _circuits: set[Circuit] = field(default_factory=set)
    _pace: Pace | None = None
    _relayed_bytes: int = 0
    _num_refused: int = 0

    def reserve(self, peer_id: PeerId, now_s: float) -> RelayStatus:
        """Gives the peer a reservation, or a longer one."""
        self._drop_expired(now_s)
        if peer_id not in self._expiries_s and len(self._expiries_s) >= self.limits.max_reservations:
            return self._refused(RelayStatus.RESERVATION_REFUSED)
        self._expiries_s[peer_id] = now_s + self.limits.reservation_s
        return RelayStatus.OK

    def release(self, peer_id: PeerId) -> None:
        """The holder wants it no more, or has left."""
        self._expiries_s.pop(peer_id, None)

    def drop_all_but(self, connected: Collection[PeerId]) -> None:
        """A reservation ends with the connection of its holder."""
        self._expiries_s = {peer: expiry_s for peer, expiry_s in self._expiries_s.items() if peer in connected}

    def _drop_expired(self, now_s: float) -> None:
        self._expiries_s = {peer: expiry_s for peer, expiry_s in self._expiries_s.items() if expiry_s > now_s}

    def open_circuit(self, source: PeerId, target: PeerId, now_s: float) -> Circuit | RelayStatus:
        """A place for a circuit, to be given back by `close_circuit`; or why there is none."""
        self._drop_expired(now_s)
        if target not in self._expiries_s:
            return self._refused(RelayStatus.NO_RESERVATION)
        of_source = Counter(circuit.source for circuit in self._circuits)
        of_target = Counter(circuit.target for circuit in self._circuits)
        if (
            len(self._circuits) >= self.limits.max_circuits
            or of_source[source] >= self.limits.max_circuits_per_source
            or of_target[target] >= self.limits.max_circuits_per_target
        ):
            return self._refused(RelayStatus.RESOURCE_LIMIT_EXCEEDED)
        circuit = Circuit(source, target)
        self._circuits.add(circuit)
        return circuit

    def close_circuit(self, circuit: Circuit) -> None:
        self._circuits.discard(circuit)

    def _refused(self, status: RelayStatus) -> RelayStatus:
        self._num_refused += 1
        return status

    # Bytes

    def relay(self, circuit: Circuit, num_bytes: int, now_s: float) -> float:
        """Counts bytes that are to be passed on; when they may be, by the rate: `now_s` or later."""
        circuit.relayed_bytes += num_bytes
        self._relayed_bytes += num_bytes
        rate = self.limits.rate_bytes_per_s
        if rate is None:
            return now_s
        if self._pace is None:
            self._pace = Pace(rate, rate * RATE_BURST_S, now_s)
        self._pace.spend(num_bytes, now_s)
        return self._pace.ready_at_s(now_s)

    def is_used_up(self, circuit: Circuit) -> bool:
        """Whether it has had all the bytes that one circuit may have."""
        return self.limits.circuit_bytes is not None and circuit.relayed_bytes > self.limits.circuit_bytes

    def statistics(self) -> RelayStatistics:
        return RelayStatistics(len(self._expiries_s), len(self._circuits), self._relayed_bytes, self._num_refused)
