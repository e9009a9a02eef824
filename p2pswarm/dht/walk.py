"""Carries out lookups: asks the contacts that a `Lookup` chooses and tells it what came of it."""

from collections.abc import Awaitable, Callable, Sequence

import trio

from p2pswarm.dht.background import Background
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.contact import Contact
from p2pswarm.dht.lookup import Lookup, LookupLimits
from p2pswarm.dht.messages import FindNode, FoundNodes
from p2pswarm.dht.neighbours import Neighbours

AskOne = Callable[[Contact], Awaitable[Sequence[Contact] | None]]
"""Asks one contact; returns the contacts it named that are worth asking, None where it did not answer."""


class Walks:
    """Lookups that start from the contacts we know.

    The requests run in the background, not in the walk: those still without an answer when it ends, or is cancelled,
    run to their own short deadline, so that who does not answer is found out.
    """

    def __init__(self, neighbours: Neighbours, background: Background, config: DhtConfig) -> None:
        self._neighbours = neighbours
        self._background = background
        self._config = config

    async def find_closest(self, target_id: bytes, width: int) -> Sequence[Contact]:
        """The `width` or more (up to k) living nodes closest to the target, ourselves excepted, the closest first."""

        async def ask_one(contact: Contact) -> Sequence[Contact] | None:
            answer = await self._neighbours.ask(contact, FindNode(target_id), FoundNodes)
            return None if answer is None else self._neighbours.usable(answer.contacts)

        return await self.run(target_id, width, ask_one)

    async def run(self, target_id: bytes, width: int, ask_one: AskOne) -> Sequence[Contact]:
        """Walks until the closest `width` living nodes have answered; returns those, and others that did, up to k."""
        start = self._neighbours.table.closest(target_id, self._config.k)
        lookup = Lookup(target_id, start, self._neighbours.own_peer_id, self._limits(width))
        walk = _Walk(lookup, ask_one)
        while True:
            lookup.advance(trio.current_time())
            for contact in lookup.next_to_ask(trio.current_time()):
                self._background.start_soon(walk.ask, contact)
            if lookup.is_finished:
                return lookup.closest_answered()
            await walk.wait_changed()

    def _limits(self, width: int) -> LookupLimits:
        config = self._config
        return LookupLimits(config.k, config.alpha, width, config.max_requests_per_lookup, config.slow_after_s)


class _Walk:
    def __init__(self, lookup: Lookup, ask_one: AskOne) -> None:
        self._lookup = lookup
        self._ask_one = ask_one
        self._changed = trio.Event()

    async def ask(self, contact: Contact) -> None:
        contacts = await self._ask_one(contact)
        if contacts is None:
            self._lookup.failed(contact.peer_id)
        else:
            self._lookup.answered(contact.peer_id, contacts)
        self._changed.set()

    async def wait_changed(self) -> None:
        """Until an answer or a silence comes, or a request has become slow."""
        with trio.move_on_at(self._lookup.wake_at_s):
            await self._changed.wait()
        self._changed = trio.Event()
