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

    async def find_closest(self, target_id: bytes, quorum: int) -> Sequence[Contact]:
        """Living nodes closest to the target, ourselves excepted, the closest first: all k, for a `quorum` of k."""

        async def ask_one(contact: Contact) -> Sequence[Contact] | None:
            answer = await self._neighbours.ask(contact, FindNode(target_id), FoundNodes)
            return None if answer is None else self._neighbours.hear_of(answer.contacts)

        return await self.run(target_id, quorum, self._config.k, ask_one)

    async def run(self, target_id: bytes, quorum: int, window: int, ask_one: AskOne) -> Sequence[Contact]:
        """Walks until `quorum` of the `window` closest living nodes have answered; returns those that did, up to k."""
        start = self._neighbours.closest_heard_of(target_id)
        lookup = Lookup(target_id, start, self._limits(quorum, window), self._neighbours.connected_peers)
        walk = _Walk(lookup, ask_one)
        while True:
            for contact in lookup.next_to_ask(trio.current_time()):
                self._background.start_soon(walk.ask, contact)
            if lookup.is_finished:
                return lookup.closest_answered()
            await walk.wait_changed()

    def _limits(self, quorum: int, window: int) -> LookupLimits:
        return LookupLimits(
            k=self._config.k,
            alpha=self._config.alpha,
            quorum=quorum,
            window=window,
            max_requests=self._config.max_requests_per_lookup,
            stagger_s=self._config.stagger_s,
        )


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
        """Until an answer or a silence comes, or it is time to ask more."""
        with trio.move_on_at(self._lookup.wake_at_s(trio.current_time())):
            await self._changed.wait()
        self._changed = trio.Event()
