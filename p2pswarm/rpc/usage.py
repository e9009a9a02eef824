"""Who holds how much of this server: streams, sessions and received bytes, per peer and in total. Pure counting."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from p2pswarm.core.errors import ServerBusy
from p2pswarm.core.ids import PeerId
from p2pswarm.rpc.limits import RpcLimits


@dataclass(slots=True)
class _Held:
    streams: int = 0
    sessions: int = 0
    received_bytes: int = 0


class Usage:
    """Grants or refuses (`ServerBusy`, with the reason) what peers ask for; forgets peers that hold nothing."""

    def __init__(self, limits: RpcLimits) -> None:
        self._limits = limits
        self._total = _Held()
        self._peers: dict[PeerId, _Held] = {}

    @property
    def num_peers(self) -> int:
        return len(self._peers)

    @property
    def num_streams(self) -> int:
        return self._total.streams

    @property
    def num_sessions(self) -> int:
        return self._total.sessions

    @property
    def received_bytes(self) -> int:
        return self._total.received_bytes

    @property
    def sessions_by_peer(self) -> Mapping[PeerId, int]:
        """Of the peers that have any."""
        return {peer_id: held.sessions for peer_id, held in self._peers.items() if held.sessions}

    @contextmanager
    def stream(self, peer_id: PeerId) -> Iterator["PeerBudget"]:
        """Within, the peer holds one more stream; what it sends there is charged to the budget."""
        held = self._peers.get(peer_id, _Held())
        if self._total.streams >= self._limits.max_streams:
            raise ServerBusy(f"no room for more than {self._limits.max_streams} streams in total", peer_id)
        if held.streams >= self._limits.max_streams_per_peer:
            raise ServerBusy(f"no room for more than {self._limits.max_streams_per_peer} streams of one peer", peer_id)
        self._peers[peer_id] = held
        for count in (held, self._total):
            count.streams += 1
        try:
            yield PeerBudget(self, peer_id)
        finally:
            for count in (held, self._total):
                count.streams -= 1
            if held.streams == 0:
                del self._peers[peer_id]

    @contextmanager
    def session(self, peer_id: PeerId) -> Iterator[None]:
        """Within, one of the peer's streams is a session."""
        held = self._peers[peer_id]
        if held.sessions >= self._limits.max_sessions_per_peer:
            raise ServerBusy(
                f"no room for more than {self._limits.max_sessions_per_peer} sessions of one peer", peer_id
            )
        for count in (held, self._total):
            count.sessions += 1
        try:
            yield
        finally:
            for count in (held, self._total):
                count.sessions -= 1

    def change_received(self, peer_id: PeerId, num_bytes: int) -> None:
        """Counts bytes that came (or, below zero, were dealt with)."""
        held, limits = self._peers[peer_id], self._limits
        if num_bytes > 0:
            if held.received_bytes + num_bytes > limits.max_received_bytes_per_peer:
                raise ServerBusy(f"requests of one peer may hold {limits.max_received_bytes_per_peer} bytes", peer_id)
            if self._total.received_bytes + num_bytes > limits.max_received_bytes:
                raise ServerBusy(f"requests may hold {limits.max_received_bytes} bytes in total", peer_id)
        for count in (held, self._total):
            count.received_bytes += num_bytes


class PeerBudget:
    """A `wire.framed_stream.ReceiveBudget`: bytes received from one peer, over all its streams."""

    def __init__(self, usage: Usage, peer_id: PeerId) -> None:
        self._usage = usage
        self._peer_id = peer_id

    def change(self, num_bytes: int) -> None:
        self._usage.change_received(self._peer_id, num_bytes)
