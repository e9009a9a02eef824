"""The serving end of the DHT's streams: who may have how many, how fast they may ask, and when they are closed.

What a request means is decided by the `answer` function handed in; see `dht/node.py`.
"""

from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from p2pswarm.core.errors import MalformedMessage
from p2pswarm.core.ids import PeerId
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.links import FramedDhtStream
from p2pswarm.dht.messages import Envelope, Failure
from p2pswarm.net.network import Stream

MAX_REMEMBERED_PACES = 2048

Answer = Callable[[PeerId, Envelope], Awaitable[Envelope]]


@dataclass(slots=True)
class Pace:
    """A token bucket: how long a peer that asks too fast has to wait."""

    tokens: float
    counted_at_s: float

    def take(self, now_s: float, rate_per_s: float, burst: int) -> float:
        """Seconds to wait before the next request is served."""
        self.tokens = min(burst, self.tokens + (now_s - self.counted_at_s) * rate_per_s) - 1
        self.counted_at_s = now_s
        return max(0.0, -self.tokens / rate_per_s)


class IncomingStreams:
    """Serves the streams that peers open."""

    def __init__(self, answer: Answer, config: DhtConfig) -> None:
        self._answer = answer
        self._config = config
        self._by_last_use: OrderedDict[Stream, None] = OrderedDict()
        self._num_by_peer: Counter[PeerId] = Counter()
        self._paces: OrderedDict[PeerId, Pace] = OrderedDict()
        self.num_served = 0

    @property
    def num_open(self) -> int:
        return len(self._by_last_use)

    async def handle(self, stream: Stream) -> None:
        """A `net.network.StreamHandler`: answers requests until the peer closes the stream or falls silent."""
        if self._num_by_peer[stream.peer_id] >= self._config.max_incoming_streams_per_peer:
            return
        if len(self._by_last_use) >= self._config.max_incoming_streams:
            next(iter(self._by_last_use)).reset()
        self._by_last_use[stream] = None
        self._num_by_peer[stream.peer_id] += 1
        try:
            await self._serve(stream)
        finally:
            self._by_last_use.pop(stream)
            self._num_by_peer[stream.peer_id] -= 1
            if not self._num_by_peer[stream.peer_id]:
                del self._num_by_peer[stream.peer_id]

    async def _serve(self, stream: Stream) -> None:
        framed = FramedDhtStream(stream)
        while True:
            with trio.move_on_after(self._config.incoming_idle_s) as silence:
                answer = await self._next_answer(framed, stream)
            if silence.cancelled_caught or answer is None:
                return
            with trio.move_on_after(self._config.incoming_idle_s) as stalled:
                await framed.send(answer)
            if stalled.cancelled_caught:
                framed.reset()
                return

    async def _next_answer(self, framed: FramedDhtStream, stream: Stream) -> Envelope | None:
        try:
            request = await framed.receive()
            if request is None:
                return None
            self._by_last_use.move_to_end(stream)
            self.num_served += 1
            wait_s = self._wait_s(stream.peer_id)
            if wait_s > 0:
                await trio.sleep(wait_s)
            return await self._answer(stream.peer_id, request)
        except MalformedMessage as error:
            return Envelope(Failure(str(error)))

    def _wait_s(self, peer_id: PeerId) -> float:
        now_s = trio.current_time()
        burst = self._config.request_burst_per_peer
        pace = self._paces.setdefault(peer_id, Pace(burst, now_s))
        self._paces.move_to_end(peer_id)
        if len(self._paces) > MAX_REMEMBERED_PACES:
            self._paces.popitem(last=False)
        return pace.take(now_s, self._config.requests_per_s_per_peer, burst)
