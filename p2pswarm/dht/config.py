"""How a DHT node behaves: the sizes of Kademlia, deadlines, and what it lets strangers make it hold or do."""

from dataclasses import dataclass, field

from p2pswarm.core.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What a node keeps for others. Full: see the eviction rules of `dht/store.py`."""

    max_records: int = 16384
    max_bytes: int = 32 * MIB
    max_records_per_key: int = 2048
    """Servers of one model."""
    max_records_per_owner: int = 32
    """An honest server has two: its model, and the list of models."""
    max_bytes_per_owner: int = 64 * KIB
    max_lifetime_s: float = 3600.0
    """Announcements live 90 s; what lives longer than this is refused."""
    clock_allowance_s: float = 60.0
    """Two honest machines' clocks may differ by this much: how far beyond `max_lifetime_s` an expiry may lie."""


@dataclass(frozen=True, slots=True)
class DhtConfig:
    """Settings of one node; the defaults suit a server and a client alike."""

    serve: bool = True
    """False: a client, which asks but is never in the tables of others, nor stores for them."""
    k: int = 20
    """Nodes that hold each record; also the size of a bucket and of an answer."""
    alpha: int = 3
    """Requests of one lookup under way at once while it still comes closer to its target."""
    read_quorum: int = 4
    """A reader has asked enough when this many of the `read_window` closest living nodes have answered. Each holds all
    records of the key, unless it came within the last seconds: four leave room for the newly arrived and for liars."""
    read_window: int = 10
    """Half of k: when a third of the nodes has died since a record was stored, these still hold it, nearly all."""
    max_requests_per_lookup: int = 120
    """Six times k: a liar who invents contacts cannot keep a lookup going."""
    request_timeout_s: float = 2.0
    """The most that a hung peer can cost; then it is left out for a while."""
    stagger_s: float = 0.05
    """A request without an answer after this long no longer counts among the `alpha`: a dial takes eight round
    trips."""
    max_outgoing_requests: int = 64
    max_links: int = 256
    """Streams kept open for later requests, one per peer; the least recently used is closed first."""
    link_idle_s: float = 120.0
    max_incoming_streams: int = 1024
    """The longest idle one is closed for a newcomer."""
    max_incoming_streams_per_peer: int = 4
    incoming_idle_s: float = 300.0
    """Longer than `link_idle_s`, so that the side that opened a stream closes it."""
    requests_per_s_per_peer: float = 100.0
    """A peer that asks faster waits; honest ones ask a few times a second, a burst of 200 when handing records over."""
    request_burst_per_peer: int = 200
    requests_per_s: float = 1000.0
    """Of all peers together: a third of a core. Beyond, their streams take turns."""
    bad_peer_s: float = 15.0
    """How long a peer that did not answer is left alone; it doubles with each failure in a row, to `max_bad_peer_s`.
    Short at first: a dial over half the globe may take longer than `request_timeout_s`, and goes on meanwhile."""
    max_bad_peer_s: float = 1800.0
    bootstrap_timeout_s: float = 10.0
    """For all given and known peers together, who are asked at once."""
    join_refreshes: int = 1
    """Buckets filled when a serving node joins; the others follow one per `refresh_period_s`."""
    handover_delay_s: float = 0.5
    """Newcomers within this time are served together."""
    trusted_s: float = 60.0
    """After a sign of life a contact is not asked for another when a newcomer could use its place in the table."""
    settle_s: float = 60.0
    """Two renewals of an announcement: by then a newcomer holds all that it should."""
    housekeeping_period_s: float = 15.0
    """Expired records are dropped, idle streams closed, known peers saved."""
    refresh_period_s: float = 120.0
    """One bucket after the other is refreshed by a lookup of a random id in it; also the oldest contact is asked."""
    recover_first_s: float = 1.0
    """An empty table is filled again from the known peers after this long, doubling to `recover_most_s`."""
    recover_most_s: float = 30.0
    store: StoreLimits = field(default_factory=StoreLimits)

    def __post_init__(self) -> None:
        for name in ("k", "alpha", "read_quorum", "max_requests_per_lookup", "max_outgoing_requests", "max_links"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}")
        if not self.read_quorum <= self.read_window <= self.k:
            sizes = f"{self.read_quorum}, {self.read_window} and {self.k}"
            raise ConfigError(f"wanted read_quorum <= read_window <= k, got {sizes}")
        if not 0 < self.stagger_s <= self.request_timeout_s:
            raise ConfigError(f"wanted 0 < stagger_s <= {self.request_timeout_s} (the timeout), got {self.stagger_s}")
