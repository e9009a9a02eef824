"""`StreamPool`: open streams between two calls, because opening one costs three round trips.

Only streams on which every request has got its whole answer come in here; all others must be reset.
"""

from collections import deque

import trio

from p2pswarm.core.ids import PeerId
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.wire.framed_stream import FramedStream


class StreamPool:
    """Idle streams, a few per peer; the oldest are closed first."""

    def __init__(self, limits: RpcLimits) -> None:
        self._limits = limits
        self._idle: deque[tuple[float, FramedStream]] = deque()
        """With the time since when; the latest last."""

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, peer_id: PeerId) -> FramedStream | None:
        """The peer's most recently used stream, which its server may have closed meanwhile."""
        self._close_old()
        for entry in reversed(self._idle):
            if entry[1].peer_id == peer_id:
                self._idle.remove(entry)
                return entry[1]
        return None

    def has(self, peer_id: PeerId) -> bool:
        """Whether a stream of the peer is kept."""
        self._close_old()
        return any(kept.peer_id == peer_id for _, kept in self._idle)

    def put(self, framed: FramedStream) -> None:
        """Keeps the stream for a later call, or closes it where enough are kept."""
        self._close_old()
        num_kept = sum(kept.peer_id == framed.peer_id for _, kept in self._idle)
        if num_kept >= self._limits.max_idle_streams_per_peer:
            framed.reset()
            return
        self._idle.append((trio.current_time(), framed))
        if len(self._idle) > self._limits.max_idle_streams:
            self._close_oldest()

    def close(self) -> None:
        """Closes all of them."""
        while self._idle:
            self._close_oldest()

    def _close_old(self) -> None:
        too_old = trio.current_time() - self._limits.keep_idle_stream_s
        while self._idle and self._idle[0][0] <= too_old:
            self._close_oldest()

    def _close_oldest(self) -> None:
        self._idle.popleft()[1].reset()
