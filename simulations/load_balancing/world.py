"""A swarm of servers that come, choose their blocks, move and go, in simulated time; they decide by the real rules.

Only the placement is simulated: an announcement is news to others a little later, loading takes its time, sessions are
given time to end before a server leaves its blocks. What `swarmd` does between two decisions, these servers do too.
"""

import heapq
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.placement.joining import settled_span, worst_served_span
from p2pswarm.placement.rebalancing import Move
from p2pswarm.placement.throughput import swarm_throughput
from simulations.load_balancing.machines import Machine

MODEL = ModelId("simulated@0123456789abcdef")
MAX_LOOKS = 3
"""At those who join or move at the same moment."""

Decide = Callable[[ServerInfo, Mapping[PeerId, ServerInfo]], Move | None]
"""Whether a server that is online should move, by what it sees; of itself, it may see what it was a moment ago."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things take."""

    oldest_news_s: float = 3.0
    """What a server sees of the others is up to so old."""
    settling_s: float = 6.0
    """From announcing a wish to acting on it: twice as long as news take."""
    check_period_s: float = 60.0
    """On average, from check to check."""
    grace_period_s: float = 30.0
    """For sessions to end before a server leaves its blocks."""
    block_load_s: float = 5.0


class Server:
    """One machine in the swarm."""

    def __init__(self, peer_id: PeerId, machine: Machine, first: ServerInfo) -> None:
        self.peer_id = peer_id
        self.machine = machine
        self.info = first
        self.is_gone = False


class World:
    """The swarm, its clock, and what is counted."""

    def __init__(self, num_model_blocks: int, decide: Decide, pace: Pace, random: Random) -> None:
        self.now_s = 0.0
        self.num_model_blocks = num_model_blocks
        self.servers: dict[PeerId, Server] = {}
        self.num_moves = 0
        self.num_blocks_reloaded = 0
        """By servers that moved."""
        self.num_withdrawn = 0
        """Wishes to move that came to nothing at the second look."""
        self._decide = decide
        self._pace = pace
        self._random = random
        self._numbers = itertools.count()
        self._agenda: list[tuple[float, int, Iterator[float]]] = []
        self._news = _News()

    def join(self, machine: Machine) -> Server:
        """A new server begins its life now."""
        peer_id = PeerId(f"{self._random.getrandbits(64):016x}")
        span = Span(0, machine.num_blocks)
        first = ServerInfo(
            peer_id, MODEL, span, ServerState.OFFLINE, (), self.num_model_blocks, machine.throughput_tokens_per_s,
            0.0, 0.0, 0.0, "float32",
        )  # fmt: skip
        server = self.servers[peer_id] = Server(peer_id, machine, first)
        self._plan(0.0, self._life(server))
        return server

    def leave(self, server: Server) -> None:
        """The server is gone without a word; others know as soon as they know anything."""
        server.is_gone = True
        del self.servers[server.peer_id]
        self._news.tell(self.now_s, server.peer_id, None)

    def run_until(self, end_s: float) -> None:
        """Lets everything happen that happens until then."""
        while self._agenda and self._agenda[0][0] <= end_s:
            self.now_s, _, life = heapq.heappop(self._agenda)
            wait_s = next(life, None)
            if wait_s is not None:
                self._plan(wait_s, life)
        self.now_s = end_s

    def throughput(self) -> float:
        """Of the swarm, counting servers where they are or will be."""
        return swarm_throughput(self.num_model_blocks, [server.info for server in self.servers.values()])

    def throughput_online(self) -> float:
        """Of the swarm, counting those who take requests at this moment."""
        online = [server.info for server in self.servers.values() if server.info.state is ServerState.ONLINE]
        return swarm_throughput(self.num_model_blocks, [replace(info, next_span=None) for info in online])

    def _plan(self, wait_s: float, life: Iterator[float]) -> None:
        heapq.heappush(self._agenda, (self.now_s + wait_s, next(self._numbers), life))

    def _life(self, server: Server) -> Iterator[float]:
        """From joining on; yields how long it waits each time."""
        span = worst_served_span(self.num_model_blocks, server.machine.num_blocks, self._look().values())
        self._tell(server, state=ServerState.JOINING, span=span)
        yield from self._settle_and_load(server)
        while not server.is_gone:
            yield self._random.uniform(0, 2 * self._pace.check_period_s)
            if not server.is_gone:
                yield from self._check(server)

    def _settle_and_load(self, server: Server) -> Iterator[float]:
        for _ in range(MAX_LOOKS):
            yield self._pace.settling_s
            if server.is_gone:
                return
            span = settled_span(server.info, self._look().values())
            if span == server.info.span:
                break
            self._tell(server, span=span)
        yield self._pace.block_load_s * server.machine.num_blocks
        if not server.is_gone:
            self._tell(server, state=ServerState.ONLINE)

    def _check(self, server: Server) -> Iterator[float]:
        move = self._decide(server.info, self._look())
        for _ in range(MAX_LOOKS):
            if move is None:
                break
            self._tell(server, next_span=move.span)
            yield self._pace.settling_s
            if server.is_gone:
                return
            move = self._decide(server.info, self._look())
            if move is not None and move.span == server.info.next_span:
                yield from self._move(server, move.span)
                return
        if server.info.next_span is not None:
            self.num_withdrawn += 1
            self._tell(server, next_span=None)

    def _move(self, server: Server, span: Span) -> Iterator[float]:
        self.num_moves += 1
        self._tell(server, state=ServerState.DRAINING)
        yield self._pace.grace_period_s
        if not server.is_gone:
            self._tell(server, state=ServerState.JOINING, span=span, next_span=None)
            self.num_blocks_reloaded += server.machine.num_blocks
            yield from self._settle_and_load(server)

    def _look(self) -> Mapping[PeerId, ServerInfo]:
        """What a server can know of all at this moment, of itself too."""
        return self._news.as_of(self.now_s - self._random.uniform(0, self._pace.oldest_news_s))

    def _tell(self, server: Server, **changes: object) -> None:
        server.info = replace(server.info, **changes)  # type: ignore[arg-type]
        self._news.tell(self.now_s, server.peer_id, server.info)


class _News:
    """Who has announced what, as of any moment in the last while."""

    def __init__(self) -> None:
        self._times_s: list[float] = [0.0]
        self._pictures: list[Mapping[PeerId, ServerInfo]] = [{}]

    def tell(self, time_s: float, peer_id: PeerId, info: ServerInfo | None) -> None:
        picture = dict(self._pictures[-1])
        picture.pop(peer_id, None)
        if info is not None:
            picture[peer_id] = info
        self._times_s.append(time_s)
        self._pictures.append(picture)
        del self._times_s[:-MAX_PICTURES], self._pictures[:-MAX_PICTURES]

    def as_of(self, time_s: float) -> Mapping[PeerId, ServerInfo]:
        return self._pictures[max(0, bisect_right(self._times_s, time_s) - 1)]


MAX_PICTURES = 256
"""Of the swarm, one after each announcement; more than there are in a few seconds."""
