"""What lies between simulated nodes: links with latency, bandwidth and loss, inboxes, ends of connections.

Nothing here runs a task per message: a segment is an entry in the receiver's inbox with its time of arrival.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import trio

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.path import DIRECT
from p2pswarm.testing.memory_stream import MemoryStream

PACKET_BYTES = 1400
"""What fits into one TCP segment on an ordinary path."""
RETRANSMISSION_S = 0.2
"""Linux' shortest wait before TCP sends a lost packet again."""

Action = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Link:
    """The path between two nodes, the same in both directions."""

    latency_s: float = 0.025
    """One way."""
    bandwidth_bytes_per_s: float = math.inf
    loss: float = 0.0
    """Chance of a packet to get lost. As over TCP, it then comes late, and all that follows it."""

    def __post_init__(self) -> None:
        if self.latency_s < 0 or self.bandwidth_bytes_per_s <= 0 or not 0 <= self.loss < 1:
            raise ConfigError(f"a link has latency >= 0, bandwidth > 0 and 0 <= loss < 1, got {self}")

    @property
    def round_trip_s(self) -> float:
        return 2 * self.latency_s

    def loss_delay_s(self, size_bytes: int, randomness: random.Random) -> float:
        """How much later a segment arrives because packets were lost; each further loss of one doubles the wait."""
        if self.loss == 0:
            return 0.0
        num_packets = math.ceil(size_bytes / PACKET_BYTES)
        delay_s = 0.0
        wait_s = RETRANSMISSION_S + self.round_trip_s
        is_lost = randomness.random() > (1 - self.loss) ** num_packets
        while is_lost:
            delay_s += wait_s
            wait_s *= 2
            is_lost = randomness.random() < self.loss
        return delay_s


class Inbox:
    """What is under way to one node, carried out in order of arrival. Paused, it keeps everything for later."""

    def __init__(self) -> None:
        self._arrivals: list[tuple[float, int, Action]] = []
        self._sequence = itertools.count()
        self._changed = trio.Event()
        self._is_paused = False

    def schedule(self, arrival_s: float, action: Action) -> None:
        entry = (arrival_s, next(self._sequence), action)
        heapq.heappush(self._arrivals, entry)
        if self._arrivals[0] is entry:
            self._changed.set()

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._changed.set()

    async def run(self) -> None:
        while True:
            self._changed = trio.Event()
            while self._has_arrivals():
                heapq.heappop(self._arrivals)[2]()
            next_arrival_s = math.inf if self._is_paused or not self._arrivals else self._arrivals[0][0]
            with trio.move_on_at(next_arrival_s):
                await self._changed.wait()

    def _has_arrivals(self) -> bool:
        return not self._is_paused and bool(self._arrivals) and self._arrivals[0][0] <= trio.current_time()


class ConnectionEnd:
    """One node's end of a connection; a `memory_stream.Carrier`."""

    def __init__(
        self,
        inbox: Inbox,
        peer_id: PeerId,
        randomness: random.Random,
        on_stream: Callable[["ConnectionEnd", MemoryStream], None],
        on_lost: Callable[["ConnectionEnd"], None],
    ) -> None:
        self.twin: ConnectionEnd = self
        self.is_open = True
        self.link = Link()
        self.path = DIRECT
        self.is_blocked = False
        """Nothing leaves: the path is cut, or the node hangs. What is sent is held until that is over."""
        self.num_changes = 0
        """Rises whenever the path is cut or mended, so that a keep-alive knows whether it has been cut all along."""
        self.streams: set[MemoryStream] = set()
        self._inbox = inbox
        self._peer_id = peer_id
        self._random = randomness
        self.on_stream = on_stream
        self._on_lost = on_lost
        self._held: list[tuple[int, Action]] = []
        self._line_free_s = 0.0
        self._last_arrival_s = 0.0

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    def transmit(self, size_bytes: int, arrive: Action) -> None:
        if not self.is_open:
            return
        if self.is_blocked:
            self._held.append((size_bytes, arrive))
            return
        self._line_free_s = max(self._line_free_s, trio.current_time()) + size_bytes / self.link.bandwidth_bytes_per_s
        arrival_s = self._line_free_s + self.link.latency_s + self.link.loss_delay_s(size_bytes, self._random)
        self._last_arrival_s = max(self._last_arrival_s, arrival_s)
        self.twin._inbox.schedule(self._last_arrival_s, arrive)

    def set_blocked(self, is_blocked: bool) -> None:
        if is_blocked == self.is_blocked:
            return
        self.is_blocked = is_blocked
        self.num_changes += 1
        if not is_blocked:
            held, self._held = self._held, []
            for size_bytes, arrive in held:
                self.transmit(size_bytes, arrive)

    def watch(self, patience_s: float) -> None:
        """The keep-alive: gives the connection up unless the path from the peer changes within `patience_s`."""
        num_changes = self.twin.num_changes

        def give_up() -> None:
            if self.is_open and self.twin.num_changes == num_changes:
                self.close("the peer gave no sign of life")

        self._inbox.schedule(trio.current_time() + patience_s, give_up)

    def close(self, why: str) -> None:
        """Ends it here at once, at the other end when the news arrives there."""
        self.transmit(PACKET_BYTES, lambda: self.twin.lose("the peer closed the connection"))
        self.lose(why)

    def lose(self, why: str) -> None:
        """It is over at this end: every stream breaks."""
        if not self.is_open:
            return
        self.is_open = False
        self._held.clear()
        for stream in list(self.streams):
            stream.break_off(why)
        self._on_lost(self)

    def forget(self, stream: MemoryStream) -> None:
        self.streams.discard(stream)
