"""`Door`: where strangers wait until their handshakes may begin; carries out what `admission.py` decides.

It knows neither sockets nor what a handshake is.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from p2pswarm.core.errors import ConnectionLost, NetworkError
from p2pswarm.net.admission import Admission, Entrant, Source
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.metering import Metered

Guest = TypeVar("Guest")

logger = logging.getLogger(__name__)


class Door:
    """The door of one node. Nobody gets in unless `run` runs."""

    def __init__(self, config: NetworkConfig) -> None:
        self._config = config
        self._admission = Admission(config, trio.current_time())
        self._has_asked = trio.Event()

    @property
    def num_present(self) -> int:
        """Strangers at the door, those in their handshakes among them."""
        return self._admission.num_present

    async def run(self) -> None:
        """Lets in whose turn it is, until cancelled."""
        while True:
            next_s = self._admission.let_in_next(trio.current_time())
            if next_s is None:
                self._has_asked = trio.Event()
                await self._has_asked.wait()
            else:
                await trio.sleep_until(next_s)

    def is_shut_to(self, source: Source) -> bool:
        """Whether the source has failed too often lately."""
        return self._admission.is_barred(source, trio.current_time())

    def note_failure(self, source: Source) -> None:
        """A handshake of the source came to nothing, or its connection was one too many."""
        if self._admission.failed(source, trio.current_time()):
            logger.warning("connections from %s keep failing; for a while no more are accepted", source)

    async def admit(
        self, source: Source, said_something: Callable[[], Awaitable[None]], handshake: Callable[[], Awaitable[Guest]]
    ) -> Guest:
        """What the handshake gives when it has had its turn.

        Raises `NetworkError`: it failed, took too long, or had to make room for another.
        """
        metered = Metered(handshake)
        scope = trio.CancelScope(deadline=trio.current_time() + self._config.dial_timeout_s)
        entrant = self._admission.arrive(source, scope.cancel)
        try:
            with scope:
                await self._first_bytes(said_something)
                await self._turn(entrant)
                return await metered
            has_waited_in_vain = not metered.seconds and trio.current_time() >= scope.deadline
            if not has_waited_in_vain:  # it stopped half way, or was one of too many
                self.note_failure(source)
            raise ConnectionLost(f"{source} was still at the door when its time, or the room, was up")
        except NetworkError:
            if not scope.cancelled_caught:
                self.note_failure(source)
            raise
        finally:
            self._admission.leave(entrant, metered.seconds, trio.current_time())

    async def _first_bytes(self, said_something: Callable[[], Awaitable[None]]) -> None:
        with trio.move_on_after(self._config.first_bytes_timeout_s):
            await said_something()
            return
        raise ConnectionLost(f"not a byte came within {self._config.first_bytes_timeout_s} s")

    async def _turn(self, entrant: Entrant) -> None:
        has_turn = trio.Event()
        self._admission.ask(entrant, has_turn.set)
        self._has_asked.set()
        await has_turn.wait()
