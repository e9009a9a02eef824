"""`Pusher`: hands the output of a step on to the next server, beside the answer to the client.

Nothing depends on it: what does not get through is forgotten, and the client sends its own copy instead.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from p2pswarm.core.errors import NetworkError, PeerUnreachable, RemoteError, RequestRefused
from p2pswarm.core.ids import PeerId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.net.network import Network
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.dial_guard import DialGuard
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.wire.messages import NextHop, Push

MAX_KEPT_STREAMS_PER_SERVER = 32
"""As many sessions may push to the same server at once without opening streams; half of what it grants."""

logger = logging.getLogger(__name__)


class Pusher:
    """Pushes for all sessions of one server. `close` it in the end."""

    def __init__(self, network: Network, limits: RpcLimits) -> None:
        self._network = network
        self._timeout_s = limits.push_timeout_s
        self._client = RpcClient(network, replace(limits, max_idle_streams_per_peer=MAX_KEPT_STREAMS_PER_SERVER))
        self._guard = DialGuard()

    def close(self) -> None:
        """Closes the idle streams."""
        self._client.close()

    async def push(self, asker: PeerId, to: NextHop, push: Push) -> None:
        """Returns when the next server has the push or cannot get it; does not raise."""
        if not self._client.has_idle_stream(to.peer_id) and to.peer_id not in self._network.connected_peers:
            if not self._guard.permits(asker, to.peer_id, trio.current_time()):
                logger.debug("%s is not dialled for %s now", to.peer_id, asker)
                return
            self._network.add_addresses(to.peer_id, to.addresses)
        try:
            await self._client.push(to.peer_id, push, self._timeout_s)
        except (NetworkError, RemoteError, RequestRefused) as error:
            logger.debug("step %d was not pushed to %s: %s", push.step_id, to.peer_id, error)
            if isinstance(error, PeerUnreachable):
                self._guard.note_unreachable(to.peer_id, trio.current_time())


class SessionPushes:
    """The pushes of one session, one at a time: a new one takes the place of one that is still under way."""

    def __init__(self, pusher: Pusher, asker: PeerId, nursery: trio.Nursery) -> None:
        self._pusher = pusher
        self._asker = asker
        self._nursery = nursery
        self._scope = trio.CancelScope()

    def start(self, to: NextHop, push: Push) -> None:
        """Begins to push and returns at once."""
        self._scope.cancel()
        self._scope = trio.CancelScope()
        self._nursery.start_soon(self._run, self._scope, to, push)

    async def _run(self, scope: trio.CancelScope, to: NextHop, push: Push) -> None:
        with scope:
            await self._pusher.push(self._asker, to, push)


@asynccontextmanager
async def open_session_pushes(pusher: Pusher, asker: PeerId) -> AsyncIterator[SessionPushes]:
    """Pushes for a session of the client `asker`; none is under way after the block."""
    async with open_transparent_nursery() as nursery:
        yield SessionPushes(pusher, asker, nursery)
        nursery.cancel_scope.cancel()
