"""`PushExchange`: where hidden states that servers push meet the sessions that they are for.

A `Push` and the step that it belongs to come on different streams, in any order. Whoever knows a session's id may push
to it: the id is a secret of the client, of this server and of the server before it. What a push holds stays charged to
its sender for as long as it waits here, and one waits a session at most.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from p2pswarm.core.errors import BadRequest
from p2pswarm.core.ids import PeerId, SessionId
from p2pswarm.wire.messages import Push, PushReply


class PushExchange:
    """The meeting place of one server. A push that nobody asks for within `max_wait_s` is dropped."""

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._slots: dict[SessionId, PushSlot] = {}

    @property
    def num_waiting(self) -> int:
        """Pushes whose steps have not come yet."""
        return sum(slot.has_waiting for slot in self._slots.values())

    @contextmanager
    def session(self, session_id: SessionId, peer_id: PeerId) -> Iterator["PushSlot"]:
        """Within, pushes to the session of that id are taken. Raises `BadRequest` where another session has it."""
        if session_id in self._slots:
            raise BadRequest(f"session id {session_id} is in use; ids are drawn at random", peer_id)
        slot = self._slots[session_id] = PushSlot()
        try:
            yield slot
        finally:
            del self._slots[session_id]
            slot.close()

    async def deliver(self, push: Push, peer_id: PeerId) -> PushReply:
        """Returns when the session has taken the push, or does not need it. Raises `BadRequest`: nobody wants it."""
        slot = self._slots.get(push.session_id)
        if slot is None:
            raise BadRequest("no session here has this id", peer_id)
        waiting = slot.offer(push)
        if waiting is not None:
            try:
                with trio.move_on_after(self._max_wait_s) as scope:
                    await waiting.is_over.wait()
            finally:
                slot.withdraw(waiting)
            if scope.cancelled_caught:
                raise BadRequest(f"step {push.step_id} was not asked for within {self._max_wait_s:g} s", peer_id)
        return PushReply()


class WaitingPush:
    """A push, until its session takes it or it turns out to be useless."""

    __slots__ = ("is_over", "push")

    def __init__(self, push: Push) -> None:
        self.push = push
        self.is_over = trio.Event()


class PushSlot:
    """A session's side of the exchange. Decides only; whoever waits is woken."""

    def __init__(self) -> None:
        self._waiting: WaitingPush | None = None
        self._first_useful_id = 0
        self._asked_id: int | None = None
        self._call: Callable[[], None] | None = None

    @property
    def has_waiting(self) -> bool:
        return self._waiting is not None

    def offer(self, push: Push) -> WaitingPush | None:
        """The push now waits here, in place of an older one; None where it is of no use any more."""
        newest_id = self._waiting.push.step_id if self._waiting is not None else 0
        if push.step_id < max(self._first_useful_id, newest_id):
            return None
        self._end_wait()
        self._waiting = WaitingPush(push)
        if push.step_id == self._asked_id and self._call is not None:
            self._call()
        return self._waiting

    def withdraw(self, waiting: WaitingPush) -> None:
        """The push no longer waits here, if it still did."""
        if self._waiting is waiting:
            self._end_wait()

    @contextmanager
    def asking(self, step_id: int, call: Callable[[], None]) -> Iterator[None]:
        """Within, `call` is called when a push for the step arrives, which can then be taken."""
        self._asked_id, self._call = step_id, call
        try:
            yield
        finally:
            self._asked_id = self._call = None

    def take(self, step_id: int) -> Push | None:
        """The push for the step, if it waits here."""
        waiting = self._waiting
        if waiting is None or waiting.push.step_id != step_id:
            return None
        self._end_wait()
        return waiting.push

    def settle(self, step_id: int) -> None:
        """Pushes for steps up to this one are of no use any more."""
        self._first_useful_id = step_id + 1
        if self._waiting is not None and self._waiting.push.step_id <= step_id:
            self._end_wait()

    def close(self) -> None:
        """The session is over."""
        self._end_wait()

    def _end_wait(self) -> None:
        if self._waiting is not None:
            self._waiting.is_over.set()
            self._waiting = None
