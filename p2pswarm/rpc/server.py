"""`RpcServer`: answers the calls of strangers on a network, each stream in a task of its own, and stops in good order.

Decides who gets a stream (`rpc/usage.py`) and who has to leave at the end. What happens on one stream is
`rpc/served_stream.py`; what is answered is the `RpcService`'s.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from p2pswarm.core.errors import ServerBusy
from p2pswarm.core.ids import PeerId
from p2pswarm.net.network import Network, Stream
from p2pswarm.rpc.answered_stream import GOODBYE_TIMEOUT_S
from p2pswarm.rpc.limits import DEFAULT_RPC_LIMITS, RPC_PROTOCOL, RpcLimits
from p2pswarm.rpc.push_exchange import PushExchange
from p2pswarm.rpc.pusher import Pusher
from p2pswarm.rpc.served_stream import CLOSE_SESSION_TIMEOUT_S, Served, ServedStream
from p2pswarm.rpc.service import RpcService
from p2pswarm.rpc.speed_tests import SpeedTestGrants
from p2pswarm.rpc.usage import Usage
from p2pswarm.wire.framed_stream import FramedStream
from p2pswarm.wire.messages import ErrorCode

SESSION_REST_S = 1.0
"""While draining, a session without a step for this long is handed back: nobody waits for its next token."""
DRAIN_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class RpcStatistics:
    """What the server holds at this moment, and what it did since it started."""

    num_peers: int
    num_streams: int
    num_sessions: int
    num_busy: int
    """Streams with a request in work."""
    received_bytes: int
    """Of requests still coming or in work."""
    num_pushes_waiting: int
    """For the steps that they belong to."""
    num_streams_served: int
    num_streams_refused: int
    sessions_by_peer: Mapping[PeerId, int]
    """Of the peers that have any."""
    errors: Mapping[ErrorCode, int]
    """What peers were told that went wrong, since the start."""


class RpcServer:
    """Serves `service` on `network` while `run` runs."""

    def __init__(self, network: Network, service: RpcService, limits: RpcLimits = DEFAULT_RPC_LIMITS) -> None:
        self._network = network
        self._limits = limits
        self._usage = Usage(limits)
        self._pushes = PushExchange(limits.push_wait_s)
        self._pusher = Pusher(network, limits)
        self._errors: Counter[ErrorCode] = Counter()
        speed_tests = SpeedTestGrants(limits)
        self._served = Served(service, limits, self._usage, self._pushes, self._pusher, speed_tests, self._errors)
        self._streams: set[ServedStream] = set()
        self._is_draining = False
        self._is_over = False
        self._num_served = 0
        self._num_refused = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled; then all streams have ended and all sessions are closed."""
        self._network.serve(RPC_PROTOCOL, self._serve)
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self._is_over = True
            with trio.move_on_after(CLOSE_SESSION_TIMEOUT_S + 2 * GOODBYE_TIMEOUT_S, shield=True):
                await self._hand_back_all()
            self._pusher.close()

    def stop_accepting(self) -> None:
        """From now on new sessions and batches are answered `DRAINING`; open sessions go on."""
        self._is_draining = True
        for served in self._streams:
            served.is_draining = True

    def accept_again(self) -> None:
        """After `stop_accepting` or `drain`: the service can take new work, the same or another than before."""
        self._is_draining = False
        for served in self._streams:
            served.is_draining = False

    async def drain(self, grace_s: float) -> None:
        """Returns when no stream is left.

        Calls in work and sessions in use get `grace_s` to finish, then they are handed back; idle ones at once.
        """
        self.stop_accepting()
        with trio.move_on_after(grace_s):
            while self._streams:
                # As long as there are sessions, others may push to them, on streams that rest in between.
                rest_s = SESSION_REST_S if self._usage.num_sessions else 0.0
                for served in self._streams:
                    if not served.is_busy and served.rest_s >= rest_s:
                        served.hand_back()
                await trio.sleep(DRAIN_POLL_S)
        await self._hand_back_all()

    def statistics(self) -> RpcStatistics:
        return RpcStatistics(
            num_peers=self._usage.num_peers,
            num_streams=self._usage.num_streams,
            num_sessions=self._usage.num_sessions,
            num_busy=sum(served.is_busy for served in self._streams),
            received_bytes=self._usage.received_bytes,
            num_pushes_waiting=self._pushes.num_waiting,
            num_streams_served=self._num_served,
            num_streams_refused=self._num_refused,
            sessions_by_peer=self._usage.sessions_by_peer,
            errors=dict(self._errors),
        )

    async def _hand_back_all(self) -> None:
        while self._streams:
            for served in self._streams:
                served.hand_back()
            await trio.sleep(DRAIN_POLL_S)

    async def _serve(self, stream: Stream) -> None:
        if self._is_over:
            stream.reset()
            return
        try:
            with self._usage.stream(stream.peer_id) as budget:
                served = ServedStream(FramedStream(stream, self._limits.wire, budget), self._served)
                served.is_draining = self._is_draining
                self._streams.add(served)
                self._num_served += 1
                try:
                    await served.run()
                finally:
                    self._streams.remove(served)
        except ServerBusy as error:
            self._num_refused += 1
            await ServedStream(FramedStream(stream), self._served).refuse(error)
