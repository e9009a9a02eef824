"""One picture of a server at work, put together from what its parts say of themselves. Plain data.

The log line (`swarmd/monitor.py`), the answer to clients who ask (`ServerLoad`) and the page for Prometheus
(`swarmd/metrics.py`) all show this, so they cannot contradict each other.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.server_load import ServerLoad
from p2pswarm.net.traffic import Traffic
from p2pswarm.rpc.server import RpcStatistics
from swarmd.engine_statistics import EngineStatistics
from swarmd.scheduling.work import Kind
from swarmd.span_life import MoveStatistics

WINDOW_S = 30.0
"""What "lately" is for tokens per second."""
MAX_TOP_PEERS = 5


@dataclass(frozen=True, slots=True)
class PeerUse:
    """What one peer has of this server."""

    peer_id: PeerId
    num_sessions: int
    served_s: float
    """Of the device's time, lately."""


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """All of it."""

    uptime_s: float
    info: ServerInfo
    """As announced."""
    rpc: RpcStatistics
    moves: MoveStatistics
    traffic: Traffic
    engine: EngineStatistics | None
    """None while no blocks are served."""
    tokens_per_s: Mapping[Kind, float]
    """Lately."""

    @property
    def top_peers(self) -> tuple[PeerUse, ...]:
        """Those who use the device most, first."""
        sessions = self.rpc.sessions_by_peer
        served_s = self.engine.dispatcher.served_s if self.engine is not None else {}
        uses = [
            PeerUse(peer_id, sessions.get(peer_id, 0), served_s.get(peer_id, 0.0)) for peer_id in {*sessions, *served_s}
        ]
        uses.sort(key=lambda use: (-use.served_s, -use.num_sessions, use.peer_id))
        return tuple(uses[:MAX_TOP_PEERS])

    def load(self) -> ServerLoad:
        """What anybody may know of it."""
        engine, tokens_per_s = self.engine, self.tokens_per_s
        return ServerLoad(
            uptime_s=self.uptime_s,
            num_sessions=self.rpc.num_sessions,
            num_waiting=engine.dispatcher.num_waiting if engine is not None else 0,
            mean_batch_rows=engine.mean_batch_rows if engine is not None else 0.0,
            cache_tokens_used=engine.memory.tokens_used if engine is not None else 0,
            cache_tokens_total=engine.memory.total_tokens if engine is not None else 0,
            num_evicted=engine.memory.num_evicted if engine is not None else 0,
            decode_tokens_per_s=tokens_per_s.get(Kind.DECODE, 0.0),
            prefill_tokens_per_s=tokens_per_s.get(Kind.PREFILL, 0.0),
            forward_tokens_per_s=tokens_per_s.get(Kind.FORWARD, 0.0),
            sent_bytes=self.traffic.sent_bytes,
            received_bytes=self.traffic.received_bytes,
            num_errors=sum(self.rpc.errors.values()),
            num_moves=self.moves.num_moves,
        )

    def as_fields(self) -> dict[str, object]:
        """For the event that tells an operator."""
        engine = self.engine
        fields: dict[str, object] = {
            "uptime_s": round(self.uptime_s, 3),
            "state": self.info.state.value,
            "blocks": str(self.info.span),
            "num_sessions": self.rpc.num_sessions,
            "num_peers": self.rpc.num_peers,
            "tokens_per_s": {kind.value: round(rate, 3) for kind, rate in self.tokens_per_s.items()},
            "sent_bytes": self.traffic.sent_bytes,
            "received_bytes": self.traffic.received_bytes,
            "errors": {code.value: count for code, count in self.rpc.errors.items()},
            "num_moves": self.moves.num_moves,
            "num_failed_moves": self.moves.num_failed_moves,
            "top_peers": [
                {"peer_id": use.peer_id, "num_sessions": use.num_sessions, "served_s": round(use.served_s, 3)}
                for use in self.top_peers
            ],
        }
        if engine is not None:
            fields |= {
                "num_waiting": engine.dispatcher.num_waiting,
                "num_decoding": engine.dispatcher.num_decoding,
                "queue_delay_s": round(engine.dispatcher.queue_delay_s, 6),
                "num_tokens": {kind.value: count for kind, count in engine.dispatcher.num_tokens.items()},
                "mean_batch_rows": round(engine.mean_batch_rows, 3),
                "cache_tokens_used": engine.memory.tokens_used,
                "cache_tokens_total": engine.memory.total_tokens,
                "num_queued": engine.memory.num_queued,
                "num_evicted": engine.memory.num_evicted,
                "num_tunings": engine.tunings.num_held,
                "tuning_bytes": engine.tunings.used_bytes,
            }
        return fields


class RecentTokens:
    """Tokens per second over the last half minute. Pure; times are handed in."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Mapping[Kind, int]]] = deque()

    def note(self, num_tokens: Mapping[Kind, int], now_s: float) -> None:
        """Takes a sample of the sums; call it every few seconds."""
        if self._samples and sum(num_tokens.values()) < sum(self._samples[-1][1].values()):
            self._samples.clear()  # other blocks, which count from 0
        self._samples.append((now_s, dict(num_tokens)))
        while len(self._samples) > 1 and self._samples[1][0] <= now_s - WINDOW_S:
            self._samples.popleft()

    def per_s(self) -> Mapping[Kind, float]:
        """Between the oldest and the newest sample."""
        if len(self._samples) < 2:
            return dict.fromkeys(Kind, 0.0)
        (began_s, before), (ended_s, after) = self._samples[0], self._samples[-1]
        return {kind: (after.get(kind, 0) - before.get(kind, 0)) / (ended_s - began_s) for kind in Kind}
