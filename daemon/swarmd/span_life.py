"""The spans of a server's life: load one, serve it, and where the swarm needs others more, go on to the next.

    load    announced as JOINING -> take a step through it -> answer requests -> announce ONLINE
    serve   keep the announcement true, watch that it is (`swarmd/watchdog.py`), look whether to move (`balancing.py`)
    move    (agreed with others) announce DRAINING, and where to -> let sessions end -> free the memory
            -> announce JOINING with the new blocks -> make way for others who move there too -> load
            -> where that fails, load the old blocks again; where that fails too, `ServerFailure`

So a server is at no moment announced as ONLINE with blocks that it does not serve, and never stays without blocks.
Knows nothing of torch, nor of why to move.
"""

import logging
import math
from dataclasses import dataclass, replace

import trio

from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerState
from p2pswarm.core.span import Span
from p2pswarm.placement.rebalancing import Move
from p2pswarm.rpc.server import RpcServer
from swarmd.balancing import Balancing
from swarmd.block_taking import make_way
from swarmd.figures import Figures
from swarmd.pings import PERIOD_S, Pings
from swarmd.presence import Presence
from swarmd.served_span import CurrentSpan, ServedSpan, SpanLoader
from swarmd.surroundings import Surroundings
from swarmd.watchdog import PROBE_TIMEOUT_S, ServerFailure, Watchdog, check_computing

MAX_LISTING_TRIES = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MoveStatistics:
    """Of a server's life so far."""

    num_moves: int
    num_failed_moves: int


@dataclass(frozen=True, slots=True)
class _Serving:
    """A span that answers requests, and who measures what about it."""

    span: ServedSpan
    pings: Pings
    figures: Figures
    watchdog: Watchdog


class SpanLife:
    """`begin`, then `serve` until it is cancelled; `rpc`, which asks `current`, runs all the time."""

    def __init__(
        self,
        around: Surroundings,
        presence: Presence,
        current: CurrentSpan,
        rpc: RpcServer,
        loader: SpanLoader,
        balancing: Balancing | None,
        *,
        grace_period_s: float,
    ) -> None:
        """Without `balancing` the server stays where it is."""
        self._around = around
        self._presence = presence
        self._current = current
        self._rpc = rpc
        self._loader = loader
        self._balancing = balancing
        self._grace_period_s = grace_period_s
        self._serving: _Serving | None = None
        self._num_moves = 0
        self._num_failed_moves = 0

    def statistics(self) -> MoveStatistics:
        return MoveStatistics(self._num_moves, self._num_failed_moves)

    async def begin(self) -> None:
        """Loads the blocks announced as joining, and answers requests. Raises what the loader raises, and
        `ServerFailure` where the blocks do not compute."""
        span = await self._loader.load(self._presence.info)
        await check_computing(span.probe)
        around = self._around
        pings = Pings(span.info, around.network, around.calls, around.random)
        figures = Figures(span.room, span.waiting, pings, span.at_speed)
        watchdog = Watchdog(
            self._presence, around.directory, span.probe, lambda: around.dht.num_contacts, around.events
        )
        self._serving = _Serving(span, pings, figures, watchdog)
        self._current.begin(span, figures)
        self._rpc.accept_again()
        await self._presence.announce(span.info)

    async def serve(self) -> None:
        """Until cancelled. Raises `ServerFailure` when this server can no longer serve."""
        around = self._around
        async with open_transparent_nursery() as nursery:
            nursery.start_soon(self._presence.follow_reach)
            nursery.start_soon(self._presence.follow_swarm, lambda: around.dht.num_contacts, around.events)
            while True:
                await self._move(await self._serve_until_move())

    async def _serve_until_move(self) -> Move:
        """Requests are answered in the background; here the announcement is kept true."""
        serving = self._serving
        assert serving is not None, "nothing was loaded"
        async with open_transparent_nursery() as nursery:
            nursery.start_soon(self._presence.follow_figures, serving.figures)
            nursery.start_soon(self._follow_next_servers, serving.pings)
            nursery.start_soon(serving.watchdog.run)
            if self._balancing is None:
                await trio.sleep_forever()
            else:
                move = await self._balancing.next_move()
            nursery.cancel_scope.cancel()
        return move

    async def _follow_next_servers(self, pings: Pings) -> None:
        """Keeps looking who is there, and how far away those are who may come next."""
        async with self._around.directory.watch(self._presence.info.model_id, PERIOD_S) as view:
            await pings.follow(view)

    async def _move(self, move: Move) -> None:
        began_at_s = trio.current_time()
        left = self._presence.info.span
        num_sessions = self._rpc.statistics().num_sessions
        self._tell("moving", left, move.span, num_sessions=num_sessions, grace_period_s=self._grace_period_s)
        await self._leave(move.span)
        await make_way(self._presence, self._around.directory)
        failure = await self._try_to_begin()
        assert self._balancing is not None
        self._balancing.note(has_moved=failure is None)
        if failure is not None:
            self._num_failed_moves += 1
            self._tell("move_failed", left, self._presence.info.span, message=failure)
            await self._go_back(left, failure)
            return
        self._num_moves += 1
        await self._make_listed()
        took_s = round(trio.current_time() - began_at_s, 3)
        gain = round(move.gain, 3) if math.isfinite(move.gain) else None
        self._tell("moved", left, self._presence.info.span, gain=gain, took_s=took_s)

    async def _leave(self, new: Span) -> None:
        """Begins nothing new, lets what runs finish, frees the memory, and announces the new blocks."""
        self._rpc.stop_accepting()
        await self._presence.announce(replace(self._presence.info, state=ServerState.DRAINING, next_span=new))
        await self._rpc.drain(self._grace_period_s)
        self._serving = None
        self._current.end()
        await self._free()
        await self._announce_joining(new)

    async def _try_to_begin(self) -> str | None:
        """None when the blocks that are announced are served; else why they are not, and nothing is held."""
        try:
            await self.begin()
        except Exception as error:
            # The border between moves and the server: whatever is wrong with the new blocks, disk, memory or a
            # download, the old ones may still be served.
            logger.exception("blocks %s could not be served", self._presence.info.span)
            return str(error) or type(error).__name__
        return None

    async def _free(self) -> None:
        """Raises `ServerFailure` where the device does not come to an end with what it is doing."""
        with trio.move_on_after(PROBE_TIMEOUT_S) as deadline:
            await self._loader.free()
        if deadline.cancelled_caught:
            raise ServerFailure(f"the device did not give memory back in {PROBE_TIMEOUT_S:.0f} s: it hangs")

    async def _go_back(self, span: Span, failure: str) -> None:
        await self._free()
        await self._announce_joining(span)
        again = await self._try_to_begin()
        if again is not None:
            raise ServerFailure(f"no blocks could be loaded after a move: first {failure}; then blocks {span}: {again}")

    async def _announce_joining(self, span: Span) -> None:
        info = self._presence.info
        await self._presence.announce(replace(info, span=span, state=ServerState.JOINING, next_span=None))

    async def _make_listed(self) -> None:
        """Waits until others can read what we announced; the watchdog goes on with it where that takes long."""
        serving = self._serving
        assert serving is not None
        for _ in range(MAX_LISTING_TRIES):
            if await serving.watchdog.is_listed():
                return
            await serving.watchdog.announce_again()

    def _tell(self, event: str, left: Span, taken: Span, **fields: object) -> None:
        self._around.events(event, from_blocks=str(left), to_blocks=str(taken), **fields)
