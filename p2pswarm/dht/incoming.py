"""The serving end of the DHT's streams: who may have how many, how fast they may ask, and when they are closed.

What a request means is decided by the `answer` function handed in; see `dht/node.py`.
"""

from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable

import trio

from p2pswarm.core.errors import MalformedMessage
from p2pswarm.core.ids import PeerId
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.links import FramedDhtStream
from p2pswarm.dht.messages import Envelope, Failure, Store
from p2pswarm.net.network import Stream
from p2pswarm.net.pace import Pace

MAX_REMEMBERED_PACES = 2048
REQUESTS_BURST_S = 2.0
"""Of the pace for all together, saved up."""
REQUESTS_PER_RECORD = 0.25
"""What it costs to take one: to check a signature takes 0.13 ms, to answer a small request 0.3 ms or more."""

Answer = Callable[[PeerId, Envelope], Awaitable[Envelope]]


class IncomingStreams:
    """Serves the streams that peers open."""

    def __init__(self, answer: Answer, config: DhtConfig) -> None:
        self._answer = answer
        self._config = config
        self._by_last_use: OrderedDict[Stream, None] = OrderedDict()
        self._num_by_peer: Counter[PeerId] = Counter()
        self._paces: OrderedDict[PeerId, Pace] = OrderedDict()
        rate_per_s = config.requests_per_s
        self._pace = Pace(rate_per_s, rate_per_s * REQUESTS_BURST_S, trio.current_time())
        self._turns = trio.StrictFIFOLock()
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
            await self._turn(stream.peer_id, _cost(request))
            return await self._answer(stream.peer_id, request)
        except MalformedMessage as error:
            return Envelope(Failure(str(error)))

    async def _turn(self, peer_id: PeerId, cost: float) -> None:
        """Waits while the peer, or all of them together, ask too fast; then streams take turns."""
        own, now_s = self._pace_of(peer_id), trio.current_time()
        own.spend(cost, now_s)
        if own.ready_at_s(now_s) > now_s:
            await trio.sleep_until(own.ready_at_s(now_s))
        if self._turns.locked() or self._pace.ready_at_s(trio.current_time()) > trio.current_time():
            async with self._turns:
                await trio.sleep_until(self._pace.ready_at_s(trio.current_time()))
        self._pace.spend(cost, trio.current_time())

    def _pace_of(self, peer_id: PeerId) -> Pace:
        now_s = trio.current_time()
        pace = self._paces.setdefault(
            peer_id, Pace(self._config.requests_per_s_per_peer, self._config.request_burst_per_peer, now_s)
        )
        self._paces.move_to_end(peer_id)
        if len(self._paces) > MAX_REMEMBERED_PACES:
            self._paces.popitem(last=False)
        return pace


def _cost(request: Envelope) -> float:
    """In requests of the cheapest sort."""
    match request.message:
        case Store(records):
            return 1 + len(records) * REQUESTS_PER_RECORD
        case _:
            return 1
