"""Speed tests: how a node finds out from its peers how fast its line is, and how much of that it does for others.

Bytes without meaning go one way, then the other; the slower way counts. Small amounts first: they show whether more is
worth sending, and TCP speeds up meanwhile. To a peer 100 ms away a line of 100 Mbit/s still shows half of it, because
TCP and our windows are not wide open yet; nearer peers show more. A stranger could use this to fill our line, so what
is granted is bounded, for each peer and for all together.
"""

from typing import Protocol

import trio

from p2pswarm.core.errors import ServerBusy
from p2pswarm.core.ids import PeerId
from p2pswarm.net.network import Network
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.wire.messages import MAX_SPEED_TEST_BYTES, SpeedTest, SpeedTestReply, WireTensor

SIZES_BYTES = (64 << 10, 256 << 10, MAX_SPEED_TEST_BYTES)
LONG_ENOUGH_S = 0.25
"""What took so long says enough of the line."""
MIN_SHARE_OF_SENDING = 0.1
"""Of the time measured, that the bytes themselves count for, however far away the peer is said to be."""


class SpeedTestGrants:
    """Counts what peers were sent and sent themselves in this period; all is forgotten when the next one begins."""

    def __init__(self, limits: RpcLimits) -> None:
        self._limits = limits
        self._period_ends_s = 0.0
        self._total_bytes = 0
        self._peer_bytes: dict[PeerId, int] = {}

    def answer(self, request: SpeedTest, peer_id: PeerId, now_s: float) -> SpeedTestReply:
        """What was asked for. Raises `ServerBusy` where that is too much."""
        limits = self._limits
        if now_s >= self._period_ends_s:
            self._period_ends_s, self._total_bytes, self._peer_bytes = now_s + limits.speed_test_period_s, 0, {}
        num_bytes = request.data.shape[0] + request.answer_bytes
        peer_bytes = self._peer_bytes.get(peer_id, 0) + num_bytes
        if peer_bytes > limits.max_speed_test_bytes_per_peer:
            raise ServerBusy(
                f"no more than {limits.max_speed_test_bytes_per_peer} bytes of speed tests a peer", peer_id
            )
        if self._total_bytes + num_bytes > limits.max_speed_test_bytes:
            raise ServerBusy(f"no more than {limits.max_speed_test_bytes} bytes of speed tests for all peers", peer_id)
        self._total_bytes += num_bytes
        self._peer_bytes[peer_id] = peer_bytes
        return SpeedTestReply(meaningless(request.answer_bytes))


class SpeedTester(Protocol):
    """`rpc.client.RpcClient`."""

    async def speed_test(self, peer_id: PeerId, sent_bytes: int, answer_bytes: int, timeout_s: float) -> None: ...


async def measure_line_bits_per_s(network: Network, rpc: SpeedTester, peer_id: PeerId, timeout_s: float) -> float:
    """How fast bytes go to and from the peer, the slower way; `timeout_s` is for each amount. Raises as `rpc` does."""

    async def way(*, up: bool) -> float:
        bits_per_s = 0.0
        for size_bytes in SIZES_BYTES:
            began_at_s = trio.current_time()
            await rpc.speed_test(peer_id, size_bytes if up else 0, 0 if up else size_bytes, timeout_s)
            took_s = trio.current_time() - began_at_s
            sending_s = max(took_s - (network.round_trip_s(peer_id) or 0.0), MIN_SHARE_OF_SENDING * took_s)
            bits_per_s = 8 * size_bytes / sending_s
            if took_s >= LONG_ENOUGH_S:
                break
        return bits_per_s

    await rpc.speed_test(peer_id, 0, 0, timeout_s)  # opens the connection and the stream
    return min(await way(up=True), await way(up=False))


def meaningless(num_bytes: int) -> WireTensor:
    """So many bytes."""
    return WireTensor("bool", (num_bytes,), bytes(num_bytes))
